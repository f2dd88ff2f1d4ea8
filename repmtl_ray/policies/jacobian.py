"""Policies that look at every coordinate of the task gradients.

Owns the way from a pass to the present tasks' [P, N] gradients at the shared parameters and from
their combination to finished gradients: one encoder backward per task. Owns no method.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Normalization, ScaleOfWeights
from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import refuse_loss_with_logs, require_finite_gradients
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class JacobianPolicy(Policy):
    """The combined gradient follows, coordinate by coordinate, from the present tasks' gradients.

    Heads follow their own task's gradient with weight 1, unless the policy says otherwise.

    Args:
        normalize, combined, max_norm: as for every policy that reads the Gramian alone
            (`gramian.py`).
    """

    normalize: Normalization = "none"
    combined: ScaleOfWeights = "one"
    max_norm: NonNegative = 0.0

    def check_loss_scale(self, *, log_losses: bool) -> None:
        refuse_loss_with_logs(self.name, "normalize", self.normalize, log_losses=log_losses)

    @abstractmethod
    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        """[N] combined gradient.

        Args:
            jacobian: [P, N] gradients of the tasks that are present, finite; at least one row.
            inputs: of the same tasks.
        """

    def backward(self, task_pass: TaskPass) -> None:
        direction, self.last_head_weights = self._combine(
            task_pass.jacobian(), self._inputs_of(task_pass)
        )
        task_pass.finish_with_direction(direction, self.last_head_weights)
        self.step += 1

    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        is_finite = gradients.isfinite().all(dim=1).cpu()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        tasks = inputs.tasks
        if len(tasks):
            rows = gradients if len(tasks) == len(self.tasks) else gradients[tasks]
            direction = self.direction(self._normalized(rows, inputs), inputs)
            direction = self._scaled(direction, len(tasks))
        else:
            direction = torch.zeros_like(gradients[0])
        return direction, self._weights_of_heads(inputs)

    def _normalized(self, rows: Tensor, inputs: StepInputs) -> Tensor:
        """[P, N] task gradients as the method gets them."""
        if self.normalize == "none":
            return rows
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()
        return rows / self._sizes(self.normalize, norms, inputs).to(rows)[:, None]

    def _scaled(self, direction: Tensor, num_present: int) -> Tensor:
        """[N] the method's direction, multiplied and shortened as the arguments say."""
        if self.combined == "tasks":
            direction = num_present * direction
        if self.max_norm > 0:
            norm = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
            if norm > self.max_norm:
                direction = direction * (self.max_norm / norm)
        return direction

    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        """[T] weights of the heads' own gradients."""
        return torch.ones(len(self.tasks), dtype=torch.float64)
