"""The times that a plan needs: an epoch measured on this machine, or those of a finished search.

Reads the files that Ray Tune leaves of a search; imports no Ray.
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

from repmtl_ray import storage
from repmtl_ray.config import Experiment, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import image_size, open_streams
from repmtl_ray.models import build_model
from repmtl_ray.runs import loop

EVALUATION_SHARE = 1 / 3
"""Cost of an evaluation batch, a forward pass, as a share of a training step's."""
_NUM_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class EpochTiming:
    """One epoch of an experiment on one device.

    Args:
        seconds: of the whole epoch, evaluation included.
        step_s: seconds per training step.
        num_steps: training batches per epoch.
        num_eval_batches: evaluation batches per epoch.
        num_parameters: of the model.
        checkpoint_bytes: estimated size of the parameters and the optimizer's state.
        device: "cpu" or "cuda".
    """

    seconds: float
    step_s: float
    num_steps: int
    num_eval_batches: int
    num_parameters: int
    checkpoint_bytes: int
    device: str


def measure_epoch(experiment: Experiment) -> EpochTiming:
    """Trains a few steps of an experiment on rendered scenes of its size, in this process.

    Raises:
        ValueError: an experiment on photographs; `read_search_timing` reads the times of a finished
            search on them.
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
    short_experiment = replace(
        experiment,
        {
            "data.path": None,
            "data.eval_split": "val",
            "data.height": height,
            "data.width": width,
            "data.num_train": _NUM_BATCHES * batch,
            "data.num_val": batch,
            "epochs": 3,
            "optimizer.halve_at_epoch": None,
        },
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = _seconds_per_epoch(short_experiment, device)
    step_s = seconds / (_NUM_BATCHES + EVALUATION_SHARE)
    num_steps, num_eval_batches = num_train // batch, math.ceil(num_val / batch)
    model = build_model(
        experiment.model, loop.selected_tasks(experiment), image_size=(height, width)
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # The checkpoint has the parameters and one moment (SGD) or two (Adam) per parameter.
    copies = {"sgd": 2}.get(experiment.optimizer.name, 3)
    return EpochTiming(
        seconds=step_s * (num_steps + EVALUATION_SHARE * num_eval_batches),
        step_s=step_s,
        num_steps=num_steps,
        num_eval_batches=num_eval_batches,
        num_parameters=num_parameters,
        checkpoint_bytes=4 * copies * num_parameters,
        device=device,
    )


def _seconds_per_epoch(experiment: Experiment, device: str) -> float:
    """The time of the faster of the second and the third epoch; the first one warms up."""
    splits = {}
    for split in ("train", "val"):
        streams = open_streams(experiment.data, split)
        rows = {stream.name: LocalRows(stream) for stream in streams}
        splits[split] = loop.Split(streams=streams, rows=rows)
    training = loop.Training(
        experiment, train=splits["train"], evaluation=splits["val"], device=device
    )
    ends = [time.perf_counter() for _ in training.epochs()]
    return min(ends[2] - ends[1], ends[1] - ends[0])


@dataclass(frozen=True, kw_only=True)
class SearchTiming:
    """The times of a finished search.

    Args:
        name: of its folder.
        num_trials: that reported an epoch.
        epochs: of a trial that was not stopped early.
        max_concurrent: largest number of trials that ran at the same time.
        num_stopped: trials with fewer epochs than the others.
        epochs_trained: of all trials together.
        epoch_s: median seconds between two reports of a trial.
        overhead_s: median seconds per trial that its epochs do not explain, including the gap until the
            next trial starts in its slot.
        hours: from the start of the first trial to the end of the last one.
    """

    name: str
    num_trials: int
    epochs: int
    max_concurrent: int
    num_stopped: int
    epochs_trained: int
    epoch_s: float
    overhead_s: float
    hours: float


def read_search_timing(directory: str | Path) -> SearchTiming:
    """Reads the times of a search from its folder in a local storage.

    Raises:
        ValueError: the folder holds no search, or no trial of it reported two epochs.
    """
    with storage.explained(str(directory)):
        files = sorted(Path(directory).expanduser().glob("search*/*/result.json"))
        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    trials = [_TrialTimes.from_reports(reports) for reports in rows if reports]
    gaps = [gap for trial in trials for gap in np.diff(trial.reports)]
    if not gaps:
        raise ValueError(
            f"{directory}: no finished search with two epochs of a trial; give the folder that a search prints as "
            "`all runs`, in a local storage."
        )
    epoch_s = float(np.median(gaps))
    # Counted in the middle of each trial, because the ends of two trials may overlap by a second.
    middles = [(trial.start + trial.end) / 2 for trial in trials]
    max_concurrent = max(sum(t.start <= middle < t.end for t in trials) for middle in middles)
    first_start, last_end = min(t.start for t in trials), max(t.end for t in trials)
    busy_s = sum(trial.end - trial.start for trial in trials)
    idle_s = max(0.0, (last_end - first_start) * max_concurrent - busy_s)
    # At the end of the search slots are idle because no trial is left; that is no overhead.
    tail_s = sum(last_end - end for end in sorted(t.end for t in trials)[-max_concurrent:])
    overheads = [t.end - t.start - len(t.reports) * epoch_s for t in trials]
    gap_s = max(0.0, idle_s - tail_s) / len(trials)
    epochs = max(len(trial.reports) for trial in trials)
    return SearchTiming(
        name=Path(directory).name,
        num_trials=len(trials),
        epochs=epochs,
        max_concurrent=max_concurrent,
        num_stopped=sum(len(trial.reports) < epochs for trial in trials),
        epochs_trained=sum(len(trial.reports) for trial in trials),
        epoch_s=epoch_s,
        overhead_s=max(0.0, float(np.median(overheads)) + gap_s),
        hours=(last_end - first_start) / 3600,
    )


@dataclass(frozen=True)
class _TrialTimes:
    """Start, end and reports of one trial, as Unix times in seconds."""

    start: float
    end: float
    reports: Sequence[float]

    @staticmethod
    def from_reports(reports: Sequence[dict[str, Any]]) -> _TrialTimes:
        # Tune rounds its timestamps to whole seconds, but not its durations.
        start = float(reports[0]["timestamp"]) - float(reports[0]["time_total_s"])
        report_times = [start + float(report["time_total_s"]) for report in reports]
        return _TrialTimes(start, report_times[-1], report_times)
