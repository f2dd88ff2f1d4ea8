"""Policies that compare gradients of independent sub-batches of a batch.

Their weights follow from A = J_1 J_2^T, the Jacobians of two independent samples. The papers draw a
batch for each. Here the rows of the one global batch are dealt out in turn, which costs no data
and does not depend on the number of workers. Deviation: all sub-batches come from one forward pass
and share its batch statistics, so where the encoder normalises batches they are not wholly
independent. Costs an encoder backward for each task of two sub-batches, and one more.

None allows `gradients="representation"`: a representation gradient belongs to a sample, and those of
different samples have no inner product. Heads follow the whole batch with weight 1. Owns no method.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.gramian import products_of
from repmtl_ray.policies.simplex import shares_among, with_shares
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class SubBatchPolicy(Policy):
    """Weights of the shared gradient come from the Jacobians of two sub-batches, and from shares
    that are remembered.

    Absent tasks keep their shares; the present ones divide the rest. A task without a label in a
    sub-batch counts as a zero gradient there.
    """

    needs_sub_batches = True
    state_names = ("shares",)

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tasks = len(self.tasks)
        self.shares = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)

    @property
    @abstractmethod
    def num_sub_batches(self) -> int:
        """Two to compare; with three the shared parameters follow the third alone, else the whole
        batch."""

    @abstractmethod
    def shares_and_weights(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """[P] new shares, summing to 1, and [P] weights.

        Args:
            products: [P, P], float64, on the CPU: J_1 J_2^T of the tasks that are present.
            shares: [P], the last ones.
        """

    @final
    def backward(self, task_pass: TaskPass) -> None:
        sub_batches = task_pass.sub_batch_gradients(self.num_sub_batches)
        first, second = (task_pass.jacobian(gradients) for gradients in sub_batches[:2])
        is_finite = (first.isfinite() & second.isfinite()).all(dim=1).cpu()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        tasks = self._inputs_of(task_pass).tasks
        self.last_weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        if len(tasks):
            products = products_of(first, second).cpu()[tasks][:, tasks]
            shares, weights = self.shares_and_weights(products, shares_among(self.shares, tasks))
            self.shares = with_shares(self.shares, shares, tasks)
            self.last_weights[tasks] = weights
        self.last_head_weights = torch.ones(len(self.tasks), dtype=torch.float64)
        task_pass.finish_with_weights(
            self.last_weights,
            head_weights=self.last_head_weights,
            gradients=sub_batches[2] if self.num_sub_batches == 3 else None,
        )
        self.step += 1
