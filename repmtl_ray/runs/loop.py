"""The epochs of one worker, without Ray: build, resume, train, evaluate, report.

Owns the order of events in a run. Every worker of a run calls `run`; tests, benches and machines
without Ray call it in their own process with `LocalRows`. A process that must decide after every
epoch whether to go on iterates over `Training.epochs`. Checkpoints are written by the `Checkpoints`
of the run; what else happens is in its callbacks (`callbacks.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import Experiment, ExperimentError, NonFiniteLossError
from repmtl_ray.data.batches import planned_batches, planned_eval_batches
from repmtl_ray.data.description import describe
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.build import (
    DTYPES,
    Split,
    build,
    build_stepper,
    check_sizes,
    eval_plan,
    num_steps,
    selected_tasks,
    size_of,
    train_plan,
)
from repmtl_ray.runs.callbacks import Callback, RunContext, StepInfo
from repmtl_ray.runs.checkpoint import Parts, Progress, Snapshot
from repmtl_ray.runs.evaluate import evaluate
from repmtl_ray.runs.holdout import HoldoutBatches
from repmtl_ray.tasks import Task


class Checkpoints(Protocol):
    """Keeps the checkpoints of a run; every worker calls it at the same moments."""

    folder: str

    def after_step(self, snapshot: Snapshot) -> None:
        """A step inside an epoch is done. The others need not wait for what this stores."""

    def after_epoch(self, snapshot: Snapshot) -> None:
        """An epoch is trained and evaluated."""


Report = Callable[[dict[str, float], Snapshot], None]
"""A function in place of a callback: receives every epoch's metrics and the run at this moment."""


class Training:
    """A run, as one of its workers trains it. Making one builds or restores its parts.

    Args:
        experiment, train, evaluation, checkpoints, callbacks, resume_from, data, workers, device: as
            for `run`, with its errors.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        train: Split,
        evaluation: Split,
        checkpoints: Checkpoints | None = None,
        callbacks: Sequence[Callback] = (),
        resume_from: str | Path | None = None,
        data: str = "",
        workers: Workers = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.experiment = experiment
        self.train, self.evaluation = train, evaluation
        self.checkpoints, self.callbacks = checkpoints, tuple(callbacks)
        self.workers, self.device = workers, torch.device(device)
        self.tasks = selected_tasks(experiment, train.tasks)
        self.steps_per_epoch = num_steps(experiment, train.streams)
        check_sizes({"train": train, experiment.data.eval_split: evaluation})
        first, size = train.streams[0], size_of(experiment, train)
        self._description = describe(self.tasks, size, first.normalize, first.inputs)
        self._data = data
        self.parts = build(experiment, self.tasks, train, device=self.device, workers=workers)
        self.progress = Progress(seed=experiment.seed)
        if resume_from is not None:
            self.progress = checkpoint.load(
                resume_from,
                experiment=experiment,
                parts=self.parts,
                data=data,
                description=self._description,
            )
            _check_place(resume_from, self.progress, self.steps_per_epoch)
            if train.loader is not None:
                train.loader.rows_read = dict(self.progress.rows_read)
        holdout: HoldoutBatches | None = None
        if self.parts.policy.needs_holdout:  # which `selected_tasks` found to be the evaluation's
            holdout = HoldoutBatches(
                experiment, self.tasks, evaluation, workers=workers, device=self.device
            )
        self._stepper = build_stepper(experiment, self.tasks, self.parts, workers, holdout=holdout)

    def epochs(self) -> Generator[dict[str, float], None, None]:
        """Trains the epochs that are left, and gives the metrics of each when it is stored.

        Raises:
            NonFiniteLossError: a loss, a gradient or a metric is not finite.
        """
        error: BaseException | None = None
        try:
            for callback in self.callbacks:
                callback.on_run_start(self._context())
            while self.progress.epochs_done < self.experiment.epochs:
                yield self._epoch()
        except BaseException as raised:
            error = raised
            raise
        finally:
            for callback in self.callbacks:
                callback.on_run_end(error)

    def snapshot(self, progress: Progress | None = None) -> Snapshot:
        """The run at this moment.

        Args:
            progress: where it is inside an epoch; None: after the last epoch.
        """
        return Snapshot(
            experiment=self.experiment,
            parts=self.parts,
            progress=progress or self.progress,
            data=self._data,
            description=self._description,
        )

    def _context(self) -> RunContext:
        return RunContext(
            experiment=self.experiment,
            tasks=self.tasks,
            description=self._description,
            evaluation=self.evaluation,
            parts=self.parts,
            progress=self.progress,
            steps_per_epoch=self.steps_per_epoch,
            folder="" if self.checkpoints is None else self.checkpoints.folder,
            workers=self.workers,
            device=self.device,
        )

    def _epoch(self) -> dict[str, float]:
        """Trains the rest of an epoch, evaluates, stores; gives its metrics."""
        progress = self.progress
        values_by_metric = {name: list(values) for name, values in progress.seen.items()}
        for step in self._steps(values_by_metric):
            if self.checkpoints is not None:
                inside = replace(
                    progress,
                    step_in_epoch=step.step_in_epoch,
                    global_step=step.global_step,
                    seen=values_by_metric,
                    rows_read=self._rows_read(),
                )
                self.checkpoints.after_step(self.snapshot(inside))
            for callback in self.callbacks:
                callback.on_step_end(step)
        self.parts.scheduler.step()
        metrics = self._metrics(values_by_metric)
        for callback in self.callbacks:
            metrics.update(callback.epoch_metrics(metrics))
        self.progress = Progress(
            epochs_done=progress.epochs_done + 1,
            global_step=int(metrics["global_step"]),
            seed=self.experiment.seed,
            history=[*progress.history, metrics],
            rows_read=self._rows_read(),
        )
        if self.checkpoints is not None:
            self.checkpoints.after_epoch(self.snapshot())
        for callback in self.callbacks:
            callback.on_epoch_end(metrics)
        return metrics

    def _rows_read(self) -> dict[str, dict[int, int]]:
        return {} if self.train.loader is None else dict(self.train.loader.rows_read)

    def _steps(self, values_by_metric: dict[str, list[float]]) -> Iterator[StepInfo]:
        """Trains the rest of an epoch's steps, and gives each when it is done.

        Args:
            values_by_metric: gets the value of every metric at each step.
        """
        experiment, progress, stepper = self.experiment, self.progress, self._stepper
        first_global_step = progress.epochs_done * self.steps_per_epoch
        if progress.step_in_epoch == 0:
            stepper.policy.begin_epoch(progress.epochs_done)
        batches = planned_batches(
            train_plan(experiment, self.tasks, self.train.streams, self.workers),
            self.train.rows,
            epoch=progress.epochs_done,
            first_step=progress.step_in_epoch,
            dtype=DTYPES[experiment.precision],
            loader=self.train.loader,
        )
        begin_s = time.perf_counter()
        for step, batch in enumerate(batches, start=progress.step_in_epoch + 1):
            wait_s = time.perf_counter() - begin_s
            values = stepper.step(batch.to(self.device), global_step=first_global_step + step - 1)
            for name, value in values.items():
                values_by_metric.setdefault(name, []).append(value)
            end_s = time.perf_counter()
            yield StepInfo(
                global_step=first_global_step + step,
                epoch=progress.epochs_done + 1,
                step_in_epoch=step,
                metrics=values,
                num_samples=batch.num_rows,
                seconds=end_s - begin_s,
                wait_seconds=wait_s,
            )
            begin_s = time.perf_counter()
        stepper.policy.end_epoch()

    def _metrics(self, values_by_metric: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """What is reported of an epoch whose steps are done."""
        experiment, epoch = self.experiment, self.progress.epochs_done + 1
        global_step = epoch * self.steps_per_epoch
        metrics: dict[str, float] = {"epoch": epoch, "global_step": global_step}
        metrics |= {n: math.fsum(values) / len(values) for n, values in values_by_metric.items()}
        policy = self.parts.policy
        metrics |= {f"policy/{name}": value for name, value in policy.metrics().items()}
        try:
            metrics |= evaluate_split(
                experiment,
                self.tasks,
                self.parts.model,
                self.evaluation,
                epoch=self.progress.epochs_done,
                workers=self.workers,
                device=self.device,
            )
        except NonFiniteLossError as error:
            raise _diverged(str(error), experiment, global_step) from error
        _check_finite(metrics, experiment, global_step)
        return metrics


def run(
    experiment: Experiment,
    *,
    train: Split,
    evaluation: Split,
    report: Report | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[Callback] = (),
    resume_from: str | Path | None = None,
    data: str = "",
    workers: Workers = ALONE,
    device: torch.device | str = "cpu",
) -> tuple[Parts, Progress]:
    """Trains an experiment as one of its workers.

    Args:
        experiment: what to do.
        train, evaluation: the samples.
        report: receives every epoch's metrics: "epoch" (from 1), "global_step", "<task>/<metric>",
            "<task>/loss" (over the evaluation split), "<task>/train_loss", "rep_mtl/<penalty>" and
            "gradient_norm" (means over the epoch), "policy/<quantity>".
        checkpoints: stores the run after epochs and inside them; None stores nothing.
        callbacks: what else happens (`callbacks.py`), in this order.
        resume_from: a checkpoint (folder or URI) of the same experiment; after an epoch or inside
            one.
        data: fingerprint of the samples; a checkpoint of other samples is refused.
        workers: all that take part; each calls this function.
        device: of this worker.

    Returns:
        The trained parts, and the progress whose `history` holds every epoch's metrics.

    Raises:
        ExperimentError: the experiment cannot be done, which every worker finds alike;
            `NonFiniteLossError` in mid-run.
        ValueError: anything that the data or the checkpoint gets wrong.
    """
    training = Training(
        experiment,
        train=train,
        evaluation=evaluation,
        checkpoints=checkpoints,
        callbacks=callbacks,
        resume_from=resume_from,
        data=data,
        workers=workers,
        device=device,
    )
    for metrics in training.epochs():
        if report is not None:
            report(metrics, training.snapshot())
    return training.parts, training.progress


def _check_place(resume_from: str | Path, progress: Progress, steps: int) -> None:
    """Whether a checkpoint stands where an epoch of so many steps has a place.

    Raises:
        ExperimentError: it does not.
    """
    if (
        progress.step_in_epoch > steps
        or progress.global_step != progress.epochs_done * steps + progress.step_in_epoch
    ):
        raise ExperimentError(
            f"checkpoint {resume_from} stands at step {progress.step_in_epoch} of epoch {progress.epochs_done + 1}, "
            f"{progress.global_step} steps in all, but an epoch has {steps} steps: the data changed. Put it back as it was, or "
            "start under a new name."
        )


def evaluate_split(
    experiment: Experiment,
    tasks: Sequence[Task],
    model: MultiTaskModel,
    split: Split,
    *,
    epoch: int = 0,
    workers: Workers,
    device: torch.device,
) -> dict[str, float]:
    """One pass over a split, after an epoch (from 0), in the experiment's precision and batches; as
    `evaluate`."""
    batches = planned_eval_batches(
        eval_plan(experiment, tasks, split.streams, workers),
        split.rows,
        epoch=epoch,
        dtype=DTYPES[experiment.precision],
        loader=split.loader,
    )
    return evaluate(
        model,
        (batch.to(device) for batch in batches),
        tasks,
        workers=workers,
        device=device,
        precision=experiment.precision,
    )


def _check_finite(metrics: Mapping[str, float], experiment: Experiment, global_step: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise _diverged(f"{name} is {value}", experiment, global_step)


def _diverged(found: str, experiment: Experiment, global_step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{found} after step {global_step} with policy {experiment.policy.name!r}; training diverged, lower the learning rate."
    )
