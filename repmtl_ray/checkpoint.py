"""All that a run must remember to go on as if it had never stopped, as one directory.

Owns the format: `state.pt` (tensors and plain values, read with weights_only=True, so that a
checkpoint made by someone else cannot run code) and `experiment.json`. Random numbers need no
state: every draw is a function of the seed, the step and the worker (step.py, data/batches.py), so
their position is the `progress` below. No Ray.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from repmtl_ray.config import Experiment, from_dict, to_dict
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.policies.base import Policy

FORMAT = 1
STATE_FILE = "state.pt"
EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, which is also where its random streams stand.

    Args:
        epochs_done: complete passes.
        global_step: optimiser steps done.
        seed: that all draws derive from.
        history: the metrics of every epoch done.
    """

    epochs_done: int = 0
    global_step: int = 0
    seed: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run that have state."""

    model: MultiTaskModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    policy: Policy


def save(
    directory: str | Path, *, experiment: Experiment, parts: Parts, progress: Progress
) -> None:
    """Writes a checkpoint; the state file appears whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "scheduler": parts.scheduler.state_dict(),
        "policy": parts.policy.state_dict(),
    }
    (directory / EXPERIMENT_FILE).write_text(json.dumps(to_dict(experiment), indent=2) + "\n")
    partial = directory / (STATE_FILE + ".partial")
    torch.save(state, partial)
    partial.replace(directory / STATE_FILE)


def load(directory: str | Path, *, experiment: Experiment, parts: Parts) -> Progress:
    """Restores the parts from a checkpoint of the same experiment.

    Raises:
        ValueError: no complete checkpoint there, a file that is none, another format, or another
            experiment's (the fields that differ are named).
    """
    directory = Path(directory)
    state = read_state(directory)
    stored = read_experiment(directory)
    if stored != experiment:
        raise ValueError(
            f"checkpoint {directory} belongs to another experiment: {_differences(to_dict(stored), to_dict(experiment))}. "
            "Resume with the same configuration, or start under a new name."
        )
    parts.model.load_state_dict(state["model"])
    parts.optimizer.load_state_dict(state["optimizer"])
    parts.scheduler.load_state_dict(state["scheduler"])
    parts.policy.load_state_dict(state["policy"])
    return Progress(**state["progress"])


def read_state(directory: str | Path) -> dict[str, Any]:
    """The raw state of a checkpoint: progress, model, optimizer, scheduler, policy; on the CPU."""
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"checkpoint {directory} has no {STATE_FILE}: it is not a checkpoint, or was never completed."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({error}); it is damaged, take the one before it."
        ) from error
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state.get('format')!r}; this version reads format {FORMAT}."
        )
    return state


def read_experiment(directory: str | Path) -> Experiment:
    """The experiment that a checkpoint belongs to."""
    return from_dict(Experiment, json.loads((Path(directory) / EXPERIMENT_FILE).read_text()))


def _differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> str:
    found = []
    for key in sorted(left.keys() | right.keys()):
        old, new = left.get(key), right.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found.append(_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return ", ".join(part for part in found if part)
