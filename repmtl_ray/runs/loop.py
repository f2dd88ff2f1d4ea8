"""The epochs of one worker, without Ray: build, resume, train, evaluate, report.

Owns the order of events in a run. `train.py` calls `run` inside every Ray Train worker; tests,
benches and machines without Ray call it in their own process with `LocalRows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import Experiment, ExperimentError, NonFiniteLossError, OptimizerConfig
from repmtl_ray.data.batches import Rows, eval_batches, train_batches
from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.description import describe
from repmtl_ray.data.sampler import check_alignable, steps_per_epoch
from repmtl_ray.data.sources import Stream, image_size, tasks_of
from repmtl_ray.data.stream import check_one_size
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.checkpoint import Parts, Progress
from repmtl_ray.runs.evaluate import evaluate
from repmtl_ray.runs.step import Stepper
from repmtl_ray.tasks import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split's streams and the way to their rows.

    Args:
        streams, rows: the samples.
        tasks, image_size: of data that `DataConfig` does not describe; None: what it says.
    """

    streams: Sequence[Stream]
    rows: Mapping[str, Rows]
    tasks: tuple[Task, ...] | None = None
    image_size: tuple[int, int] | None = None


Write = Callable[[str | Path], None]
"""Writes a checkpoint of this moment to a new folder or URI."""

Report = Callable[[dict[str, float], Write], None]
"""Called after every epoch, on every worker, with its metrics and the way to a checkpoint."""

AfterStep = Callable[[int, int, int, Write], None]
"""Called after every step, on every worker, with the epochs done, the steps done in this one and
in all, and the way to a checkpoint, which the others need not wait for."""


def selected_tasks(
    experiment: Experiment, known: tuple[Task, ...] | None = None
) -> tuple[Task, ...]:
    """The tasks that an experiment trains, in the data set's order.

    Args:
        experiment: what is trained.
        known: the data set's tasks; None: those that `DataConfig` says.

    Raises:
        ExperimentError: a task that the data set lacks; a policy or penalty that does not fit their
            number.
    """
    known = tasks_of(experiment.data) if known is None else known
    names = [task.name for task in known]
    wanted = experiment.tasks or names
    for name in wanted:
        if name not in names:
            raise ExperimentError(
                f"tasks: {name!r} is not a task of {experiment.data.name}; it has {', '.join(names)}."
            )
    tasks = tuple(task for task in known if task.name in wanted)
    try:
        policies.check(
            experiment.policy,
            [task.name for task in tasks],
            max_gradient_norm=experiment.optimizer.max_gradient_norm,
        )
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    if len(tasks) < 2 and experiment.regularizer.active:
        raise ExperimentError(
            f"tasks: {tasks[0].name!r} is the only one, but Rep-MTL's penalties compare tasks; set regularizer.lambda_tsr and "
            "regularizer.lambda_csa to 0 (single-task training: policy 'stl')."
        )
    return tasks


def num_steps(experiment: Experiment, streams: Sequence[Stream]) -> int:
    """Optimiser steps in an epoch.

    Args:
        experiment: what is trained.
        streams: all of the training split.

    Raises:
        ExperimentError: a batch that is larger than the split; rows that cannot be paired.
    """
    try:
        if experiment.data.pairing == "class":
            check_alignable(streams)
        return steps_per_epoch(streams, experiment.batch_size)
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def build(
    experiment: Experiment,
    tasks: Sequence[Task],
    *,
    device: torch.device,
    workers: Workers,
    size: tuple[int, int] | None = None,
) -> Parts:
    """Model, optimiser, scheduler and policy as they are before the first step; equal on every
    worker. `size` is that of the images, where `DataConfig` does not say it."""
    torch.manual_seed(experiment.seed)
    model = build_model(
        experiment.model,
        tasks,
        image_size=size or image_size(experiment.data),
        workers=workers,
        penalized=experiment.regularizer.active,
    )
    model = model.to(device=device, dtype=DTYPES[experiment.precision])
    workers.broadcast_([*model.parameters(), *model.buffers()])
    optimizer = _optimizer(experiment.optimizer, model)
    halve_at = experiment.optimizer.halve_at_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 if halve_at is not None and epoch >= halve_at else 1.0
    )
    policy = policies.build(experiment.policy, [task.name for task in tasks], seed=experiment.seed)
    return Parts(model=model, optimizer=optimizer, scheduler=scheduler, policy=policy)


def _optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=rate, weight_decay=decay, momentum=config.momentum
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=rate, weight_decay=decay)


def run(
    experiment: Experiment,
    *,
    train: Split,
    evaluation: Split,
    report: Report,
    after_step: AfterStep | None = None,
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
        after_step: may write checkpoints inside an epoch.
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
    device = torch.device(device)
    tasks = selected_tasks(experiment, train.tasks)
    steps = num_steps(experiment, train.streams)
    _check_sizes({"train": train, experiment.data.eval_split: evaluation})
    size = train.image_size or image_size(experiment.data)
    description = describe(tasks, size, train.streams[0].normalize)
    parts = build(experiment, tasks, device=device, workers=workers, size=size)
    stored: dict[str, Any] = {
        "experiment": experiment,
        "parts": parts,
        "data": data,
        "description": description,
    }
    progress = Progress(seed=experiment.seed)
    if resume_from is not None:
        progress = checkpoint.load(resume_from, **stored)
        _check_place(resume_from, progress, steps)
    stepper = _stepper(experiment, tasks, parts, workers)
    while progress.epochs_done < experiment.epochs:
        epoch = progress.epochs_done
        values_by_metric = {name: list(values) for name, values in progress.seen.items()}
        first_global_step = epoch * steps
        for step in _train_epoch(
            experiment,
            stepper,
            train,
            progress,
            values_by_metric,
            first_global_step=first_global_step,
            device=device,
        ):
            if after_step is not None:
                global_step = first_global_step + step
                inside = replace(
                    progress, step_in_epoch=step, global_step=global_step, seen=values_by_metric
                )
                write = partial(checkpoint.save, **stored, progress=inside)
                after_step(epoch, step, global_step, write)
        parts.scheduler.step()
        global_step = first_global_step + steps
        metrics: dict[str, float] = {"epoch": epoch + 1, "global_step": global_step}
        metrics |= {n: math.fsum(values) / len(values) for n, values in values_by_metric.items()}
        metrics.update({f"policy/{name}": value for name, value in parts.policy.metrics().items()})
        try:
            metrics |= evaluate_split(
                experiment, tasks, parts.model, evaluation, workers=workers, device=device
            )
        except NonFiniteLossError as error:
            raise _diverged(str(error), experiment, global_step) from error
        _check_finite(metrics, experiment, global_step)
        progress = Progress(
            epochs_done=epoch + 1,
            global_step=global_step,
            seed=experiment.seed,
            history=[*progress.history, metrics],
        )
        report(metrics, partial(checkpoint.save, **stored, progress=progress))
    return parts, progress


def _check_sizes(splits: Mapping[str, Split]) -> None:
    """Whether all images have one size, read from a first sample where a stream does not know it.

    Raises:
        ExperimentError: they have several.
    """
    streams = {
        name: [
            stream
            if stream.image_size is not None
            else replace(stream, image_size=_first_size(split.rows[stream.name]))
            for stream in split.streams
        ]
        for name, split in splits.items()
    }
    try:
        check_one_size(streams)
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def _first_size(rows: Rows) -> tuple[int, int]:
    _, height, width, _ = rows.fetch(np.array([0]), [IMAGE])[IMAGE].shape
    return height, width


def _train_epoch(
    experiment: Experiment,
    stepper: Stepper,
    train: Split,
    progress: Progress,
    values_by_metric: dict[str, list[float]],
    *,
    first_global_step: int,
    device: torch.device,
) -> Iterator[int]:
    """Trains the rest of an epoch, and gives the number of its steps that are done after each.

    Args:
        experiment, stepper, train, progress: of the run.
        values_by_metric: gets the value of every metric at each step.
        first_global_step: steps of the run before this epoch.
        device: of this worker.
    """
    if progress.step_in_epoch == 0:
        stepper.policy.begin_epoch(progress.epochs_done)
    batches = train_batches(
        train.streams,
        train.rows,
        tasks=[task.name for task in stepper.tasks],
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        epoch=progress.epochs_done,
        first_step=progress.step_in_epoch,
        workers=stepper.workers,
        augment=experiment.data.augment,
        pairing=experiment.data.pairing,
        dtype=DTYPES[experiment.precision],
    )
    for step, batch in enumerate(batches, start=progress.step_in_epoch + 1):
        values = stepper.step(batch.to(device), global_step=first_global_step + step - 1)
        for name, value in values.items():
            values_by_metric.setdefault(name, []).append(value)
        yield step
    stepper.policy.end_epoch()


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
    workers: Workers,
    device: torch.device,
) -> dict[str, float]:
    """One pass over a split in the experiment's precision and batches; as `evaluate`."""
    batches = eval_batches(
        split.streams,
        split.rows,
        tasks=[task.name for task in tasks],
        batch_size=max(1, experiment.batch_size // workers.size),
        workers=workers,
        dtype=DTYPES[experiment.precision],
    )
    return evaluate(
        model,
        (batch.to(device) for batch in batches),
        tasks,
        workers=workers,
        device=device,
        precision=experiment.precision,
    )


def _stepper(
    experiment: Experiment, tasks: Sequence[Task], parts: Parts, workers: Workers
) -> Stepper:
    regularizer = experiment.regularizer
    return Stepper(
        model=parts.model,
        tasks=tasks,
        policy=parts.policy,
        policy_name=experiment.policy.name,
        optimizer=parts.optimizer,
        regularizer=RepMTL(
            regularizer.lambda_tsr, regularizer.lambda_csa, regularizer.temperature, workers=workers
        ),
        representation=experiment.model.representation,
        log_losses=experiment.policy.log_losses,
        max_gradient_norm=experiment.optimizer.max_gradient_norm,
        precision=experiment.precision,
        seed=experiment.seed,
        workers=workers,
    )


def _check_finite(metrics: Mapping[str, float], experiment: Experiment, global_step: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise _diverged(f"{name} is {value}", experiment, global_step)


def _diverged(found: str, experiment: Experiment, global_step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{found} after step {global_step} with policy {experiment.policy.name!r}; training diverged, lower the learning rate."
    )
