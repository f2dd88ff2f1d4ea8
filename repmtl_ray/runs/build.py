"""What a run is made of before its first step: tasks, samples, model, optimiser, policy.

Owns the checks that need the tasks and the sizes of the data, and the initial state, which is equal
on every worker. No Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import OWN_MODEL, Experiment, ExperimentError, OptimizerConfig
from repmtl_ray.data.batches import Loader, Rows
from repmtl_ray.data.collate import collate
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID, Batch, Inputs
from repmtl_ray.data.plan import EvalPlan, TrainPlan, select
from repmtl_ray.data.sampler import check_alignable, steps_per_epoch
from repmtl_ray.data.sources import Stream, image_size, tasks_of
from repmtl_ray.data.stream import check_one_size, contents_of, fingerprint_of
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.models.compute import use_compute
from repmtl_ray.models.own import ModelFunction, build_own_model
from repmtl_ray.regularizers import regularizer_of
from repmtl_ray.runs.checkpoint import Parts
from repmtl_ray.runs.loss_scale import LossScale
from repmtl_ray.runs.parameters import evaluating
from repmtl_ray.runs.step import Stepper
from repmtl_ray.tasks import Task
from repmtl_ray.tasks.base import is_of_project
from repmtl_ray.tasks.custom import check_on

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float16": torch.float32,
    "float64": torch.float64,
}
_NUM_LOOKED_AT = 16
"""Samples on which losses and metrics of the user's own are tried before training."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split's streams and the way to their rows.

    Args:
        streams, rows: the samples.
        tasks, image_size: of data that `DataConfig` does not describe; None: what it says, or no
            images.
        loader: who makes the batches of these samples; None: threads of this process.
        make_model: makes a model that `ModelConfig` does not describe.
    """

    streams: Sequence[Stream]
    rows: Mapping[str, Rows]
    tasks: tuple[Task, ...] | None = None
    image_size: tuple[int, int] | None = None
    loader: Loader | None = None
    make_model: ModelFunction | None = None

    def fingerprint(self) -> str:
        """What the samples' content is known by; reads every one of them.

        Raises:
            ValueError: a sample that is not as it should be.
        """
        contents = {
            name: np.concatenate([contents_of(rows.fetch(np.array([n]))) for n in range(len(rows))])
            for name, rows in self.rows.items()
        }
        return fingerprint_of(contents)

    def example_inputs(self) -> Inputs:
        """The encoder's inputs for the first two samples (twice the same if there is one)."""
        return self.example_batch([], 2).inputs

    def example_batch(self, tasks: Sequence[str], num_rows: int) -> Batch:
        """The first samples of every stream that has one of the tasks, or of the first stream (the
        last one again if there are fewer)."""
        parts = []
        for stream in select(self.streams, tasks) or self.streams[:1]:
            rows = self.rows[stream.name]
            first = np.arange(num_rows).clip(max=len(rows) - 1)
            own = [task for task in tasks if task in stream.kinds]
            parts.append((stream, rows.fetch(first, [SAMPLE_ID, *stream.inputs, *own])))
        return collate(parts, tasks, torch.float32)


def train_plan(
    experiment: Experiment, tasks: Sequence[Task], streams: Sequence[Stream], workers: Workers
) -> TrainPlan:
    """What this worker's training batches hold.

    Args:
        experiment, tasks: what is trained.
        streams: all of the training split.
        workers: of the run, as this one sees them.
    """
    return TrainPlan(
        streams=tuple(streams),
        tasks=tuple(task.name for task in tasks),
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        workers=workers,
        augment=experiment.data.augment,
        pairing=experiment.data.pairing,
    )


def eval_plan(
    experiment: Experiment, tasks: Sequence[Task], streams: Sequence[Stream], workers: Workers
) -> EvalPlan:
    """What this worker's batches of an evaluation hold; arguments as for `train_plan`."""
    return EvalPlan(
        streams=tuple(streams),
        tasks=tuple(task.name for task in tasks),
        batch_size=max(1, experiment.batch_size // workers.size),
        workers=workers,
    )


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
            share=experiment.regularizer.share,
            eval_split=experiment.data.eval_split,
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


def size_of(experiment: Experiment, train: Split | None) -> tuple[int, int] | None:
    """(height, width) of the images; None without images."""
    if train is None or train.tasks is None:
        return image_size(experiment.data)
    return train.image_size


def initial_model(
    experiment: Experiment,
    tasks: Sequence[Task],
    train: Split | None = None,
    *,
    workers: Workers = ALONE,
) -> MultiTaskModel:
    """The model of an experiment before training, on the CPU.

    Args:
        experiment, tasks, workers: of the run.
        train: the training samples, of which two show what a model of the user's own takes; None:
            `DataConfig` and `ModelConfig` say everything.

    Raises:
        ExperimentError: a model, a loss or a metric of the user's own that is missing or cannot be
            used, or images that are missing.
        ValueError: as `build_model`.
    """
    model = _initial_model(experiment, tasks, train, workers)
    own = [task for task in tasks if task.code_fields or not is_of_project(task)]
    if own and train is not None:
        batch = train.example_batch([task.name for task in own], _NUM_LOOKED_AT)
        with torch.no_grad(), evaluating(model):
            predictions = model(batch.inputs, batch.rows)
        try:
            for task in own:
                check_on(
                    task,
                    predictions[task.name],
                    batch.targets[task.name],
                    penalized=experiment.regularizer.active,
                )
        except ValueError as error:
            raise ExperimentError(str(error)) from error
    return model


def _initial_model(
    experiment: Experiment, tasks: Sequence[Task], train: Split | None, workers: Workers
) -> MultiTaskModel:
    penalized = experiment.regularizer.active
    if experiment.model.encoder != OWN_MODEL:
        size = size_of(experiment, train)
        if size is None:
            raise ExperimentError(
                f"model.encoder {experiment.model.encoder!r} sees images, but the data have none "
                "(CustomData.inputs); hand over a model of your own: model=..."
            )
        return build_model(
            experiment.model,
            tasks,
            image_size=size,
            workers=workers,
            penalized=penalized,
            normalize=None if train is None else train.streams[0].normalize,
        )
    if train is None or train.make_model is None:
        raise ExperimentError(
            f"model.encoder is {OWN_MODEL!r}, but no model was handed over; give the function that "
            "makes it: model=..."
        )
    try:
        return build_own_model(
            train.make_model,
            experiment.model,
            tasks,
            inputs=train.example_inputs(),
            known=None if train.tasks is None else [task.name for task in train.tasks],
            workers=workers,
            penalized=penalized,
        )
    except ValueError as error:
        raise ExperimentError(str(error)) from error


def build(
    experiment: Experiment,
    tasks: Sequence[Task],
    train: Split | None = None,
    *,
    device: torch.device,
    workers: Workers,
) -> Parts:
    """Model, optimiser, scheduler and policy as they are before the first step; equal on every
    worker. Arguments as for `initial_model`."""
    torch.manual_seed(experiment.seed)
    model = initial_model(experiment, tasks, train, workers=workers)
    model = model.to(device=device, dtype=DTYPES[experiment.precision])
    workers.broadcast_([*model.parameters(), *model.buffers()])
    use_compute(model, experiment.compute)
    optimizer = _optimizer(experiment.optimizer, model, fused=experiment.compute.fused)
    halve_at = experiment.optimizer.halve_at_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 if halve_at is not None and epoch >= halve_at else 1.0
    )
    policy = policies.build(experiment.policy, [task.name for task in tasks], seed=experiment.seed)
    return Parts(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        policy=policy,
        loss_scale=LossScale() if experiment.precision == "float16" else None,
    )


def _optimizer(
    config: OptimizerConfig, model: torch.nn.Module, *, fused: bool
) -> torch.optim.Optimizer:
    # None, not False: torch then chooses between its other forms.
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": fused or None,
    }
    if config.name == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **options)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **options)


def check_sizes(splits: Mapping[str, Split]) -> None:
    """Whether all images have one size, read from a first sample where a stream does not know it.

    Raises:
        ExperimentError: they have several.
    """
    streams = {
        name: [
            stream
            if stream.image_size is not None or IMAGE not in stream.inputs
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


def build_stepper(
    experiment: Experiment,
    tasks: Sequence[Task],
    parts: Parts,
    workers: Workers,
    *,
    holdout: Callable[[int], Batch] | None = None,
) -> Stepper:
    """What does a step with these parts; `holdout` as in `Stepper`."""
    return Stepper(
        model=parts.model,
        tasks=tasks,
        policy=parts.policy,
        policy_name=experiment.policy.name,
        optimizer=parts.optimizer,
        regularizer=regularizer_of(experiment.regularizer, workers),
        representation=experiment.model.representation,
        log_losses=experiment.policy.log_losses,
        max_gradient_norm=experiment.optimizer.max_gradient_norm,
        precision=experiment.precision,
        seed=experiment.seed,
        workers=workers,
        diagnostics=experiment.regularizer.diagnostics,
        direction=experiment.regularizer.direction,
        loss_scale=parts.loss_scale,
        holdout=holdout,
    )
