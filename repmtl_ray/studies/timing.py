"""Time per epoch of every method as a ratio to EW (figure 8).

Owns the measurement: the training loop (`loop.run`) in this process, on one device. The methods take
turns, so that other work of the machine slows all of them. Evaluation is on one sample, so that it
hardly counts. No Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from repmtl_ray.config import Experiment, ExperimentError, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import Stream, open_streams
from repmtl_ray.data.stream import Subset
from repmtl_ray.report.table import aligned
from repmtl_ray.runs import loop
from repmtl_ray.studies.methods import method

REFERENCE = "EW"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The times of a method.

    Args:
        method: its name.
        seconds: per measured epoch; empty if the method failed.
        ratio: of its median to EW's; None unless both were measured.
        error: why it failed; empty if it did not.
    """

    method: str
    seconds: tuple[float, ...]
    ratio: float | None = None
    error: str = ""


def time_methods(
    experiment: Experiment,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int = 3,
    epochs: int = 1,
    device: torch.device | str = "cpu",
) -> list[Timing]:
    """Measures the epochs of every method, in several rounds over the methods.

    Args:
        experiment: what the methods share.
        methods: the changes of each method by its name; EW is added if it is missing.
        rounds: how often every method is trained.
        epochs: measured per round, after one epoch that warms up.
        device: to train on.

    Returns:
        The times in the order of the methods; EW is the first.

    Raises:
        ValueError: a method cannot be trained, or the data is not valid.
    """
    if rounds < 1 or epochs < 1:
        raise ValueError(f"rounds is {rounds} and epochs {epochs}; expected at least 1.")
    experiments = _experiments(experiment, methods, epochs)
    train = _split(open_streams(experiment.data, "train"))
    evaluation = _split(
        [
            _first_sample(stream)
            for stream in open_streams(experiment.data, experiment.data.eval_split)
        ]
    )
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        for name, own in experiments.items():
            if name not in errors:
                try:
                    seconds[name] += _epoch_seconds(own, train, evaluation, torch.device(device))
                except ExperimentError as error:
                    errors[name] = str(error)
    reference_s = median(seconds[REFERENCE]) if seconds[REFERENCE] else None
    return [
        Timing(
            method=name,
            seconds=tuple(seconds[name]),
            ratio=median(seconds[name]) / reference_s if reference_s and seconds[name] else None,
            error=errors.get(name, ""),
        )
        for name in experiments
    ]


def _experiments(
    experiment: Experiment, methods: Mapping[str, Mapping[str, Any]], epochs: int
) -> dict[str, Experiment]:
    """What is trained, by method; checked before anything is measured."""
    experiments = {}
    for name, changes in {REFERENCE: method(REFERENCE), **methods}.items():
        try:
            experiments[name] = replace(experiment, {**changes, "epochs": epochs + 1})
            loop.selected_tasks(experiments[name])
        except ValueError as error:
            raise ValueError(f"method {name!r}: {error}") from error
    return experiments


def timing_table(timings: Sequence[Timing]) -> str:
    """A table for the terminal, and the reasons of the methods that failed."""
    rows = [
        [
            timing.method,
            *(f"{function(timing.seconds):.3f}" for function in (median, min, max)),
            "n/a" if timing.ratio is None else f"{timing.ratio:.2f}",
        ]
        for timing in timings
        if timing.seconds
    ]
    headings = ["method", "median s", "fastest s", "slowest s", f"ratio to {REFERENCE}"]
    failures = [f"{timing.method}: failed: {timing.error}" for timing in timings if timing.error]
    return "\n".join([aligned(headings, rows), *failures])


def _epoch_seconds(
    experiment: Experiment, train: loop.Split, evaluation: loop.Split, device: torch.device
) -> list[float]:
    """Seconds per epoch, without the first epoch."""
    training = loop.Training(experiment, train=train, evaluation=evaluation, device=device)
    ends: list[float] = []
    for _ in training.epochs():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _first_sample(stream: Stream) -> Stream:
    classes = None if stream.classes is None else stream.classes[:1]
    return dataclasses.replace(
        stream, num_samples=1, load=Subset(stream.load, (0,)), classes=classes
    )


def _split(streams: Sequence[Stream]) -> loop.Split:
    return loop.Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams})
