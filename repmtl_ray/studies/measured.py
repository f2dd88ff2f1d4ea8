"""What a plan is made from: an epoch measured on this machine, or the times of a finished search.

Owns both measurements; what follows from them is `plan`'s. Reads Tune's record of a search as
files; imports no Ray.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repmtl_ray.config import Experiment, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import image_size, open_streams
from repmtl_ray.models import build_model
from repmtl_ray.runs import loop

EVALUATION_PART = 1 / 3
"""Of a training step: an evaluation batch is its forward pass."""
_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of an experiment on one device.

    Args:
        seconds: of the whole epoch, evaluation included.
        step_s: of a training step.
        num_steps, num_evaluations: batches of an epoch.
        parameters: of the model.
        checkpoint_bytes: about; parameters and the optimiser's state.
        device: "cpu" or "cuda".
    """

    seconds: float
    step_s: float
    num_steps: int
    num_evaluations: int
    parameters: int
    checkpoint_bytes: int
    device: str


def measure_epoch(experiment: Experiment) -> Epoch:
    """Trains a few real steps of an experiment on rendered scenes of its size, here, without Ray.

    Raises:
        ValueError: an experiment on photographs, whose epochs a search has to be asked for
            (`read_search`).
    """
    data = experiment.data
    if data.name not in ("cityscapes", "nyuv2"):
        raise ValueError(
            f"{data.name}: an epoch can only be measured on rendered scenes; give --epoch-seconds, or --calibrate with a "
            "small search of this data."
        )
    height, width = image_size(data)
    batch = experiment.batch_size
    num_train, num_val = data.num_train, data.num_val
    if data.path is not None:
        num_train = open_streams(data, "train")[0].num_samples
        num_val = open_streams(data, data.eval_split)[0].num_samples
    assert num_train is not None, "DataConfig fills it in"
    assert num_val is not None, "DataConfig fills it in"
    short = replace(
        experiment,
        {
            "data.path": None,
            "data.eval_split": "val",
            "data.height": height,
            "data.width": width,
            "data.num_train": _BATCHES * batch,
            "data.num_val": batch,
            "epochs": 3,
            "optimizer.halve_at_epoch": None,
        },
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = _seconds_of_epochs(short, device)
    step_s = seconds / (_BATCHES + EVALUATION_PART)
    num_steps, num_evaluations = num_train // batch, math.ceil(num_val / batch)
    model = build_model(
        experiment.model, loop.selected_tasks(experiment), image_size=(height, width)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = {"sgd": 2}.get(experiment.optimizer.name, 3)  # of every parameter: itself and moments
    return Epoch(
        seconds=step_s * (num_steps + EVALUATION_PART * num_evaluations),
        step_s=step_s,
        num_steps=num_steps,
        num_evaluations=num_evaluations,
        parameters=parameters,
        checkpoint_bytes=4 * copies * parameters,
        device=device,
    )


def _seconds_of_epochs(experiment: Experiment, device: str) -> float:
    """The faster of the second and the third epoch; the first warms up."""
    splits = {}
    for split in ("train", "val"):
        streams = open_streams(experiment.data, split)
        rows = {stream.name: LocalRows(stream) for stream in streams}
        splits[split] = loop.Split(streams=streams, rows=rows)
    ends: list[float] = []

    def report(*_: Any, **__: Any) -> None:
        ends.append(time.perf_counter())

    loop.run(
        experiment, train=splits["train"], evaluation=splits["val"], report=report, device=device
    )
    return min(ends[2] - ends[1], ends[1] - ends[0])


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished search took.

    Args:
        name: of its folder.
        num_trials: that reported an epoch.
        epochs: of those that were not stopped.
        at_once: trials that ran at the same time, at most.
        stopped: trials with fewer epochs than the others.
        epochs_trained: of all trials together.
        epoch_s: median between two reports of a trial.
        overhead_s: median of a trial's time that its epochs do not explain, the gap before the next
            trial in its slot included.
        hours: from the first trial's start to the last one's end.
    """

    name: str
    num_trials: int
    epochs: int
    at_once: int
    stopped: int
    epochs_trained: int
    epoch_s: float
    overhead_s: float
    hours: float


def read_search(directory: str | Path) -> Record:
    """Reads the times of a search from the folder that it left in its storage.

    Raises:
        ValueError: no search, or one without two epochs of a trial.
    """
    files = sorted(Path(directory).expanduser().glob("search/*/result.json"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    trials = [_Times.of(reports) for reports in rows if reports]
    gaps = [gap for trial in trials for gap in np.diff(trial.reports)]
    if not gaps:
        raise ValueError(
            f"{directory}: no finished search with two epochs of a trial; give the folder that a search prints as "
            "`all runs`, in a local storage."
        )
    epoch_s = float(np.median(gaps))
    middles = [(trial.start + trial.end) / 2 for trial in trials]  # ends may overlap by a second
    at_once = max(sum(t.start <= middle < t.end for t in trials) for middle in middles)
    spent = sum(trial.end - trial.start for trial in trials)
    first, last = min(t.start for t in trials), max(t.end for t in trials)
    in_slots = [t.end - t.start - len(t.reports) * epoch_s for t in trials]
    idle = max(0.0, (last - first) * at_once - spent)
    tail = sum(last - end for end in sorted(t.end for t in trials)[-at_once:])
    epochs = max(len(trial.reports) for trial in trials)
    return Record(
        name=Path(directory).name,
        num_trials=len(trials),
        epochs=epochs,
        at_once=at_once,
        stopped=sum(len(trial.reports) < epochs for trial in trials),
        epochs_trained=sum(len(trial.reports) for trial in trials),
        epoch_s=epoch_s,
        overhead_s=max(0.0, float(np.median(in_slots)) + max(0.0, idle - tail) / len(trials)),
        hours=(last - first) / 3600,
    )


@dataclass(frozen=True)
class _Times:
    """Of one trial, in seconds since the epoch of the clock."""

    start: float
    end: float
    reports: Sequence[float]

    @staticmethod
    def of(reports: Sequence[dict[str, Any]]) -> _Times:
        # Tune's timestamps are whole seconds, its durations are not.
        start = float(reports[0]["timestamp"]) - float(reports[0]["time_total_s"])
        at = [start + float(report["time_total_s"]) for report in reports]
        return _Times(start, at[-1], at)
