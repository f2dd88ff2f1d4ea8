"""Auto-Lambda: weights that lower the outer losses after a step of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Number
from repmtl_ray.policies.bilevel import BilevelPolicy, gradient_of
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.perturbations import require_finite
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class AutoLambda(BilevelPolicy):
    """a follows the slope of the sum of outer losses after one step of the model on the inner ones,
    by a finite difference; then the model follows the training losses with the new weights.

    With th' = th - rate grad(sum_t w_t L_t) and d the gradient of the sum of outer losses at th',
    the slope in a is -rate (S(th + e d) - S(th - e d)) / (2 e), where S is the derivative of the
    inner weighted loss by a and e = 0.01 / |d|.

    Args:
        inner_learning_rate: rate; None is the optimiser's at that moment, as in the code.

    Source:
        Liu, James, Davison and Johns, "Auto-Lambda: disentangling dynamic task relationships",
        TMLR 2022, arXiv:2202.03091, as in LibMTL (softmax weights, outer rate 0.001). LibMTL takes
        halves of the training batch, which is outer="train". State: a, its Adam. Costs 3 forward
        passes beside the step's own (4 with outer="train") and 3 encoder backwards.
    """

    inner_learning_rate: Annotated[float | None, Number(above=0, or_none=True)] = None

    name = "Auto-Lambda"

    def backward(self, task_pass: TaskPass) -> None:
        tasks = task_pass.present.cpu().nonzero().flatten()
        self._inputs_of(task_pass)
        of_tasks = [[saliency] for saliency in task_pass.saliency]
        require_finite(self.name, self.step + 1, task_pass, of_tasks)
        if len(tasks):
            rate = self.inner_learning_rate or task_pass.learning_rate
            slopes = self._slopes(task_pass, tasks, rate)
            self.logits.step(-rate * slopes, tasks)
        self.finish(task_pass, self.weights_of(tasks))

    def _slopes(self, task_pass: TaskPass, tasks: Tensor, rate: float) -> Tensor:
        """[P] change of the derivative of the inner weighted loss by a, along d."""
        weights = self.weights_of(tasks)
        with self.look_inside(task_pass) as here:
            inner = gradient_of(here, weights)
        with self.look_outside(task_pass, [-rate * part for part in inner]) as there:
            outer = gradient_of(there, torch.ones_like(weights))
        length = float(torch.nn.utils.get_total_norm([part.double() for part in outer]))
        is_finite = torch.full((len(self.tasks),), math.isfinite(length))
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        if length == 0:
            return torch.zeros(len(tasks), dtype=torch.float64)
        size = 0.01 / length
        losses = []
        for sign in (1, -1):
            with self.look_inside(task_pass, [sign * size * part for part in outer]) as moved:
                losses.append(moved.losses.double().cpu()[tasks])
        change = (losses[0] - losses[1]) / (2 * size)
        shares = weights[tasks]
        return shares * (change - shares @ change)
