"""Second looks of a step: with other parameters, over other rows, or at sub-batches.

Owns what `TaskPass.look`, `losses_at` and `sub_batch_gradients` do. The forward pass itself is the
step's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.collectives import Workers
from repmtl_ray.config import ExperimentError
from repmtl_ray.conversion import NonFiniteGradientError, NonFiniteLossError
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.policies.task_pass import Penalty, TaskGradients, TaskPass
from repmtl_ray.runs.finite_checks import HostValues, check_losses
from repmtl_ray.runs.graph_split import GraphSplit, TaskDerivatives, unscaled
from repmtl_ray.runs.parameters import evaluating, moved


class Stepping(Protocol):
    """What a look needs of a `Stepper`, whose module imports this one."""

    @property
    def model(self) -> MultiTaskModel: ...
    @property
    def policy_name(self) -> str: ...
    @property
    def log_losses(self) -> bool: ...
    @property
    def workers(self) -> Workers: ...
    @property
    def holdout(self) -> Callable[[int], Batch] | None: ...
    @property
    def task_names(self) -> tuple[str, ...]: ...
    @property
    def head_parameters(self) -> list[list[Parameter]]: ...
    def where(self, global_step: int) -> str: ...
    def plain_losses(self, batch: Batch, global_step: int) -> Tensor: ...
    def differentiated(
        self, batch: Batch, global_step: int, *, part: tuple[int, int] = (0, 1)
    ) -> tuple[GraphSplit, list[Tensor], Any, TaskDerivatives]: ...
    def losses(
        self,
        predictions: Sequence[Tensor],
        batch: Batch,
        *,
        sub_batch: int = 0,
        num_sub_batches: int = 1,
    ) -> Any: ...
    def checked(
        self,
        losses: Any,
        derivatives: TaskDerivatives,
        penalty: Penalty | None,
        where: str,
        penalty_terms: Mapping[str, Tensor],
        diagnostics: Mapping[str, Tensor],
    ) -> HostValues: ...
    def task_pass(
        self,
        batch: Batch,
        global_step: int,
        predictions: Sequence[Tensor],
        values: HostValues,
        split: GraphSplit,
        derivatives: TaskDerivatives,
        penalty: Penalty | None,
    ) -> TaskPass: ...


@contextlib.contextmanager
def look(
    stepper: Stepping,
    batch: Batch,
    global_step: int,
    derivatives: TaskDerivatives,
    moves: Sequence[Tensor] | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    holdout: bool = False,
) -> Iterator[TaskPass]:
    """As `TaskPass.look`.

    Args:
        stepper, batch, global_step: of the step.
        derivatives: of the step's first pass, whose parameters are moved.
        moves, part, holdout: as for `TaskPass.look`.
    """
    if holdout:
        assert stepper.holdout is not None  # checked before training
        batch = stepper.holdout(global_step)
    _require_rows(stepper, batch, part[1])
    # A second forward pass must not count in the running statistics.
    with moved(_parameters(stepper, derivatives), moves), frozen_statistics(stepper.model):
        split, predictions, losses, there = stepper.differentiated(batch, global_step, part=part)
        with _blaming_gradients(moves):
            values = stepper.checked(losses, there, None, stepper.where(global_step), {}, {})
        yield stepper.task_pass(batch, global_step, predictions, values, split, there, None)


@torch.no_grad()
def losses_at(
    stepper: Stepping,
    batch: Batch,
    global_step: int,
    derivatives: TaskDerivatives,
    moves: Sequence[Tensor],
) -> Tensor:
    """As `TaskPass.losses_at`; arguments as for `look`."""
    with moved(_parameters(stepper, derivatives), moves), evaluating(stepper.model):
        losses = stepper.plain_losses(batch, global_step)
    where = stepper.where(global_step)
    with _blaming_gradients(moves):
        check_losses(stepper.task_names, losses.tolist(), log_losses=False, where=where)
    return losses


@contextlib.contextmanager
def _blaming_gradients(moves: Sequence[Tensor] | None) -> Iterator[None]:
    """Raises `NonFiniteGradientError` for a loss that is not finite after gradients moved the parameters.

    The loss was finite before, so these gradients are too large.
    """
    try:
        yield
    except NonFiniteLossError as error:
        if moves is None:
            raise
        raise NonFiniteGradientError(str(error)) from error


def sub_batch_gradients(
    stepper: Stepping,
    batch: Batch,
    global_step: int,
    derivatives: TaskDerivatives,
    leaf: Tensor,
    predictions: Sequence[Tensor],
    num_sub_batches: int,
    *,
    scale: float = 1.0,
) -> list[TaskGradients]:
    """As `TaskPass.sub_batch_gradients`.

    Args:
        stepper, batch, global_step, derivatives: of the step's first pass.
        leaf: of its split.
        predictions: by task.
        num_sub_batches: see there.
        scale: losses are multiplied by it, and the derivatives are divided by it.
    """
    _require_rows(stepper, batch, num_sub_batches)
    inputs, gradients = [leaf, *derivatives.downstream_parameters], []
    for number in range(num_sub_batches):
        losses = stepper.losses(
            predictions, batch, sub_batch=number, num_sub_batches=num_sub_batches
        )
        check_losses(
            stepper.task_names,
            losses.plain.tolist(),
            log_losses=stepper.log_losses,
            where=stepper.where(global_step),
        )
        by_task = [
            unscaled(
                torch.autograd.grad(
                    loss if scale == 1 else loss * scale,
                    inputs,
                    retain_graph=True,
                    allow_unused=True,
                ),
                scale,
            )
            for loss in losses.trained
        ]
        gradients.append(
            TaskGradients(
                saliency=[
                    torch.zeros_like(leaf) if of_task[0] is None else of_task[0]
                    for of_task in by_task
                ],
                downstream_gradients=[of_task[1:] for of_task in by_task],
            )
        )
    return gradients


def _require_rows(stepper: Stepping, batch: Batch, num_parts: int) -> None:
    """Whether a batch has a row for each part of it that a policy compares.

    Raises:
        ExperimentError: it has fewer rows.
    """
    num_rows = max(rows.stop - rows.start for rows in batch.rows.values()) * stepper.workers.size
    if num_rows < num_parts:
        raise ExperimentError(
            f"batch_size is {num_rows}, but policy {stepper.policy_name!r} compares {num_parts} "
            f"parts of a batch; take at least {num_parts}."
        )


def _parameters(stepper: Stepping, derivatives: TaskDerivatives) -> list[Parameter]:
    """As `TaskPass.parameters`."""
    heads = (parameter for head in stepper.head_parameters for parameter in head)
    return [*derivatives.upstream_parameters, *derivatives.downstream_parameters, *heads]
