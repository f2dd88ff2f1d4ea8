"""What may happen beside training: the calls that `loop.run` makes at the moments of a run.

A subclass of `Callback` overrides the methods that it needs, and an instance of it goes to
`loop.run(..., callbacks=[...])`. The order of calls is:

    on_run_start(context)
        on_step_end(step)             after every optimiser step
        epoch_metrics(metrics)        after the evaluation, before the epoch's checkpoint
        on_epoch_end(metrics)         after the epoch's checkpoint is stored
    on_run_end(error)                 also when the run fails

- Every worker makes the same calls with the same metrics. A callback that writes a file or talks to a
  server does so where `context.workers.rank` is 0.
- A callback never changes a result: it must not draw random numbers from the global generators, and
  must not change the model. What it adds in `epoch_metrics` is stored with the epoch, so it must be
  the same after a restart. Measured times belong into `on_step_end` and `on_epoch_end`.
- An exception in a callback ends the run.
- A run that is continued calls `on_run_start` again; `context.progress` says where it stands.

Imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repmtl_ray.delta import delta_p

if TYPE_CHECKING:
    import torch

    from repmtl_ray.collectives import Workers
    from repmtl_ray.config import Experiment
    from repmtl_ray.data.description import DataDescription
    from repmtl_ray.runs.build import Split
    from repmtl_ray.runs.checkpoint import Parts, Progress
    from repmtl_ray.tasks import Task


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a callback may know of its run.

    Args:
        experiment: what is trained.
        tasks: that are trained, in the data set's order.
        description: of the data.
        evaluation: samples that the run is evaluated on after every epoch.
        parts: model, optimiser, scheduler and policy; they change while the run trains.
        progress: where the run starts; not at 0 when it is continued.
        steps_per_epoch: optimiser steps.
        folder: path or URI of the run; "" without one.
        workers: of the run, as this one sees them.
        device: of this worker.
    """

    experiment: Experiment
    tasks: Sequence[Task]
    description: DataDescription
    evaluation: Split
    parts: Parts
    progress: Progress
    steps_per_epoch: int
    folder: str
    workers: Workers
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A step that is done.

    Args:
        global_step: steps of the run, this one included.
        epoch: that the step belongs to, from 1.
        step_in_epoch: from 1.
        metrics: of the step, by name, as `loop.run` describes them ("<task>/train_loss", ...).
        num_samples: of this worker's part of the batch.
        seconds: from the end of the step before to the end of this one.
        wait_seconds: the part of it in which the step waited for its batch.
    """

    global_step: int
    epoch: int
    step_in_epoch: int
    metrics: Mapping[str, float]
    num_samples: int
    seconds: float
    wait_seconds: float


class Callback:
    """Does nothing at any moment of a run; subclasses override what they need."""

    def on_run_start(self, context: RunContext) -> None:
        """The run is built or restored, and begins to train."""

    def on_step_end(self, step: StepInfo) -> None:
        """A step is done; if a checkpoint was due, it is stored."""

    def epoch_metrics(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Further metrics of an epoch, by name; stored with it and reported like the others."""
        return {}

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        """An epoch is trained, evaluated and stored."""

    def on_run_end(self, error: BaseException | None) -> None:
        """The run ends: with all its epochs (None), with an error, or stopped early (GeneratorExit)."""


class AddDeltaP(Callback):
    """Adds "delta_p_task" and "delta_p_metric" (percent) to every epoch.

    Args:
        baseline: single-task metrics by name.
    """

    def __init__(self, baseline: Mapping[str, float]) -> None:
        self._baseline = dict(baseline)

    def epoch_metrics(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        delta = delta_p(metrics, self._baseline)
        return {"delta_p_task": delta.task, "delta_p_metric": delta.metric}
