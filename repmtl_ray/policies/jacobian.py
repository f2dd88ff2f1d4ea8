"""Policies that look at every coordinate of the task gradients.

Owns the way from a pass to the present tasks' [P, N] gradients at the shared parameters and from
their combination to finished gradients: one encoder backward per task. Owns no method.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.task_pass import TaskPass


class JacobianPolicy(Policy):
    """The combined gradient follows, coordinate by coordinate, from the present tasks' gradients.

    Heads follow their own task's gradient with weight 1, unless the policy says otherwise.
    """

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
            all_present = len(tasks) == len(self.tasks)
            direction = self.direction(gradients if all_present else gradients[tasks], inputs)
        else:
            direction = torch.zeros_like(gradients[0])
        return direction, self._weights_of_heads(inputs)

    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        """[T] weights of the heads' own gradients."""
        return torch.ones(len(self.tasks), dtype=torch.float64)
