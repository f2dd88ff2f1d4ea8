"""Policies whose weights are learnt on other rows than the model: the outer level of two.

Owns where the outer rows come from, the weights (a softmax of numbers with an Adam of their own),
and gradients of weighted losses by every parameter, as one list. Owns no method.

Two forms of rows. "holdout": the inner losses are of the whole training batch, the outer ones of a
batch of the holdout split. "train": both are of the training batch, rows 0, 2, 4, ... of the global
batch inside and rows 1, 3, 5, ... outside, as LibMTL halves a batch; no sample is held out, so
weights are learnt on what the model fits. Outer losses are means over their own rows' labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class BilevelPolicy(Policy):
    """Weights of the losses are softmax(a) over the present tasks; a starts at equal numbers.

    Heads are weighed as the shared parameters: both levels see the whole model. The a of an absent
    task does not move.

    Args:
        outer: whose losses steer a: a "holdout" batch's, or those of half of the "train" batch.
        outer_learning_rate: of the Adam of a.
    """

    outer: Literal["holdout", "train"] = "holdout"
    outer_learning_rate: Positive = 1e-3

    needs_looks = True
    state_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logits = TaskAdam(len(self.tasks), learning_rate=self.outer_learning_rate)

    @property
    def needs_holdout(self) -> bool:
        return self.outer == "holdout"

    def look_inside(
        self, task_pass: TaskPass, moves: Sequence[Tensor] | None = None
    ) -> AbstractContextManager[TaskPass]:
        """The pass of the inner rows; the step's own one if it is of the same rows and place."""
        if self.outer == "train":
            return task_pass.look(moves, part=(0, 2))
        return contextlib.nullcontext(task_pass) if moves is None else task_pass.look(moves)

    def look_outside(
        self, task_pass: TaskPass, moves: Sequence[Tensor] | None = None
    ) -> AbstractContextManager[TaskPass]:
        """The pass of the outer rows."""
        if self.outer == "train":
            return task_pass.look(moves, part=(1, 2))
        return task_pass.look(moves, holdout=True)

    def weights_of(self, tasks: Tensor) -> Tensor:
        """[T] weights of the losses; 0 for those that are not among the tasks."""
        return self._spread(self.logits.values[tasks].softmax(dim=0), tasks, absent=0.0)

    def finish(self, task_pass: TaskPass, weights: Tensor) -> None:
        """Leaves the gradient of the weighted losses of the whole training batch."""
        self.last_weights = self.last_head_weights = weights
        task_pass.finish_with_weights(weights)
        self.step += 1

    def require_finite(self, gradients: Sequence[Tensor]) -> None:
        """Refuses [T, size] task gradients that are not finite, the same on every worker."""
        flags = torch.stack([rows.isfinite().all(dim=1).cpu() for rows in gradients]).all(dim=0)
        require_finite_gradients(self.name, self.tasks, self.step + 1, flags)


def gradient_of(task_pass: TaskPass, weights: Tensor) -> list[Tensor]:
    """By `TaskPass.parameters`, the gradient of sum_t weights[t] losses[t], global; one encoder
    backward."""
    shared = task_pass.shared
    direction = task_pass.direction(weights)
    parts = direction.split([parameter.numel() for parameter in shared])
    gradient = [part.view_as(p) for part, p in zip(parts, shared, strict=True)]
    for weight, head in zip(weights.tolist(), task_pass.global_head_gradients(), strict=True):
        gradient += [weight * part for part in head]
    return gradient


def rows_of(task_pass: TaskPass) -> list[Tensor]:
    """[T, P] task gradients at the shared parameters, then by task those at its own head, [T, size]
    with zeros in the other tasks' rows; global; T encoder backwards."""
    num_tasks = len(task_pass.tasks)
    rows = [task_pass.jacobian()]
    for task, head in enumerate(task_pass.global_head_gradients()):
        own = torch.cat([part.reshape(-1) for part in head])
        block = own.new_zeros(num_tasks, len(own))
        block[task] = own
        rows.append(block)
    return rows


def combined_rows(task_pass: TaskPass, rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """By `TaskPass.parameters`, the weighted sum of the rows of `rows_of`."""
    flat = torch.cat([weights.to(block) @ block for block in rows])
    parameters = task_pass.parameters
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """[T, T] inner products of the rows of two lists from `rows_of`, float64, on the CPU."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        total = total + (a.double() @ b.double().T).cpu()
    return total


def softmax_slopes(weights: Tensor) -> Tensor:
    """[P, P] derivatives of a softmax by its numbers, from its [P] values."""
    return torch.diag(weights) - torch.outer(weights, weights)
