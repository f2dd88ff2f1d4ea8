"""Time per epoch of every method as a ratio to EW (figure 8).

Owns the measurement: the same loop as training (`loop.run`), in this process, on the device at hand,
methods in turn so that a slow minute hits all of them. Evaluation is on one sample and so hardly
counts. No Ray.
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
from repmtl_ray.data.holdout import Subset
from repmtl_ray.data.sources import Stream, open_streams
from repmtl_ray.runs import loop
from repmtl_ray.studies.methods import method

REFERENCE = "EW"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a method's epochs took.

    Args:
        method: its name.
        seconds: of every measured epoch; none if it failed.
        ratio: of its median to EW's, if both were measured.
        error: why it failed, or nothing.
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
    """Trains every method for some epochs in each round, and takes the time of all but the first.

    Args:
        experiment: what they share.
        methods: by name, what each changes; EW is added if it is not among them.
        rounds: how often every method is run.
        epochs: measured in each, after one that warms up.
        device: to train on.

    Returns:
        In the order of the methods; fastest and slowest differ by what the machine did meanwhile.

    Raises:
        ValueError: a method that cannot be trained; data that is not as it should be.
    """
    if rounds < 1 or epochs < 1:
        raise ValueError(f"rounds is {rounds} and epochs {epochs}; expected at least 1.")
    chosen = {REFERENCE: method(REFERENCE), **methods}
    experiments = {
        name: replace(experiment, {**changes, "epochs": epochs + 1})
        for name, changes in chosen.items()
    }
    for name, own in experiments.items():
        try:
            loop.selected_tasks(own)
        except ValueError as error:
            raise ValueError(f"method {name!r}: {error}") from error
    train = _split(open_streams(experiment.data, "train"))
    evaluation = _split(
        [_first(stream) for stream in open_streams(experiment.data, experiment.data.eval_split)]
    )
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        for name, own in experiments.items():
            if name not in errors:
                try:
                    seconds[name] += _epochs(own, train, evaluation, torch.device(device))
                except ExperimentError as error:
                    errors[name] = str(error)
    usual = median(seconds[REFERENCE]) if seconds[REFERENCE] else None
    return [
        Timing(
            method=name,
            seconds=tuple(seconds[name]),
            ratio=median(seconds[name]) / usual if usual and seconds[name] else None,
            error=errors.get(name, ""),
        )
        for name in experiments
    ]


def text(timings: Sequence[Timing]) -> str:
    """An aligned table, and the reasons of those that failed."""
    width = max(len(timing.method) for timing in timings)
    lines = [f"{'method':<{width}}  median s  fastest s  slowest s  ratio to {REFERENCE}"]
    for timing in timings:
        if timing.seconds:
            middle, fastest, slowest = (f(timing.seconds) for f in (median, min, max))
            ratio = "n/a" if timing.ratio is None else f"{timing.ratio:.2f}"
            lines.append(
                f"{timing.method:<{width}}  {middle:>8.3f}  {fastest:>9.3f}  {slowest:>9.3f}  "
                f"{ratio:>11}"
            )
        if timing.error:
            lines.append(f"{timing.method:<{width}}  failed: {timing.error}")
    return "\n".join(lines)


def _epochs(
    experiment: Experiment, train: loop.Split, evaluation: loop.Split, device: torch.device
) -> list[float]:
    """Seconds of every epoch but the first."""
    ends: list[float] = []

    def report(metrics: dict[str, float], write: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    loop.run(experiment, train=train, evaluation=evaluation, report=report, device=device)
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _first(stream: Stream) -> Stream:
    classes = None if stream.classes is None else stream.classes[:1]
    return dataclasses.replace(
        stream, num_samples=1, load=Subset(stream.load, (0,)), classes=classes
    )


def _split(streams: Sequence[Stream]) -> loop.Split:
    return loop.Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams})
