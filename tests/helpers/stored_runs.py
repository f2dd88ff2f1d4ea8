"""Checkpoints of a run that hold no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repmtl_ray import storage
from repmtl_ray.runs import checkpoint_manager
from repmtl_ray.runs.checkpoint_manager import MARKER_FILE, Marker, describe, marker_text

STATE = b"the state of a run" * 20


def saving(
    epochs_done: Any, step_in_epoch: int = 0, errors: tuple[()] = (), step: Any = None
) -> dict[str, Any]:
    """What `CheckpointManager.write` is given, for a small state; `errors`, of every epoch done."""
    files = {"state.pt": STATE, "experiment.json": b"{}"}
    history = [{"depth/abs_error": error} for error in errors or [1.0] * epochs_done]
    at = {
        "epochs_done": epochs_done,
        "step_in_epoch": step_in_epoch,
        "global_step": 4 * epochs_done + step_in_epoch if step is None else step,
    }

    def save(location: Any) -> None:
        for name, data in files.items():
            storage.write(f"{location}/{name}", data)
        marker = Marker(files=describe(files), history=history, **at)
        storage.write(f"{location}/{MARKER_FILE}", marker_text(marker).encode())

    return {"save": save, **at}


def places(folder: Path) -> list[Any]:
    """(epochs done, step in epoch) of what lies there."""
    found = [checkpoint_manager.NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(match[1]), int(match[2])) for match in found if match)
