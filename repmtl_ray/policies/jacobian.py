"""Policies that look at every coordinate of the task gradients.

Owns the way from a pass to the present tasks' [P, N] gradients at the shared parameters and from
their combination to finished gradients: one encoder backward a task. Owns no method.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from repmtl_ray.policies.base import GradientPolicy
from repmtl_ray.policies.memory import read_back, written
from repmtl_ray.policies.refusals import refuse_non_finite
from repmtl_ray.policies.task_pass import TaskPass


class JacobianPolicy(GradientPolicy):
    """The combined gradient is found by coordinates, from the present tasks' gradients.

    Heads follow their own task's gradient with weight 1, unless the policy says otherwise.
    """

    name: ClassVar[str]
    remembered: ClassVar[tuple[str, ...]] = ()

    def backward(self, task_pass: TaskPass) -> None:
        jacobian = task_pass.jacobian()
        finite = jacobian.isfinite().all(dim=1).cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, finite)
        tasks = task_pass.present.cpu().nonzero().flatten()
        everyone = len(tasks) == len(self.tasks)
        if len(tasks):
            present = jacobian if everyone else jacobian[tasks]
            direction = self._direction(present, tasks, task_pass)
        else:
            direction = torch.zeros_like(jacobian[0])
        task_pass.finish_with_direction(direction, self._head_weights(task_pass))
        self.step += 1

    @abstractmethod
    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        """[N] combined gradient.

        Args:
            jacobian: [P, N] gradients of the tasks that are present, finite; may be overwritten.
            tasks: [P], their indices, on the CPU; at least one.
            task_pass: that they are of.
        """

    def _state(self) -> dict[str, Any]:
        return written(self, self.remembered)

    def _load_state(self, state: dict[str, Any]) -> None:
        read_back(self, self.remembered, state, self.name)
