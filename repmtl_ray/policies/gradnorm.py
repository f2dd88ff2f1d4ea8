"""GradNorm: weights that bring the tasks' gradient norms to where their training rates want them.

Owns the method; the gradients at the last shared layer are `TaskPass.last_layer_jacobian`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Positive
from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class GradNorm(Policy):
    """GradNorm: w = P softmax(theta), theta learnt so that the norms of w_t grad L_t tend to the
    mean norm times r_t^alpha.

    r_t is L_t by its initial value, by the mean of those ratios over tasks. Norms are taken at the
    last shared layer, where the backward passes end: about one encoder backward and a bit (`combine`
    takes them of the gradients that it gets). Needs positive losses: it takes their ratio. An absent
    task is out of the softmax and the mean, and its theta does not move. The theta of a zero gradient
    follows the others' pull; all other gradients are fine, as only their norms count.

    Args:
        alpha: strength of the pull towards equal training rates.
        learning_rate: of theta, which has an Adam of its own.
        initial_losses: from the first "step", as in the paper, or the means of the first "epoch",
            which trains as EW, as in LibMTL. A task absent then takes its first loss later.

    Source:
        Chen et al., ICML 2018, arXiv:1711.02257, equations 1 and 2, algorithm 1; alpha 1.5 as for
        their NYUv2 (0.12 for their MultiNIST). Deviations: the softmax keeps weights positive and
        their sum P, where the paper renormalises raw weights after every step (LibMTL does as
        here); theta has UW's rate, where LibMTL takes the model's optimiser; LibMTL's norms are
        over all shared parameters; heads follow w_t L_t, the paper's total loss (LibMTL: L_t).
        State: theta and its Adam, initial losses, epoch.
    """

    alpha: NonNegative = 1.5
    learning_rate: Positive = 0.025
    initial_losses: Literal["step", "epoch"] = "step"

    name = "GradNorm"
    needs_positive_losses = True
    state_names = ("initial_sums", "num_initial", "epoch", "logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logits = TaskAdam(len(self.tasks), learning_rate=self.learning_rate)
        self.initial_sums = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.num_initial = torch.zeros_like(self.initial_sums)
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def backward(self, task_pass: TaskPass) -> None:
        gradients = task_pass.last_layer_jacobian()
        self.last_head_weights = self._weights(gradients, self._inputs_of(task_pass))
        task_pass.finish_with_weights(self.last_head_weights)
        self.step += 1

    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        weights = self._weights(gradients, inputs)
        return weights.to(gradients) @ gradients, weights

    def _weights(self, gradients: Tensor, inputs: StepInputs) -> Tensor:
        """[T] weights of the task gradients, which are [T, P]."""
        norms = gradients.double().norm(dim=1).cpu()
        require_finite_gradients(self.name, self.tasks, self.step + 1, norms.isfinite())
        tasks, to_plain = inputs.tasks, inputs.to_plain
        self.last_weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        if len(tasks):
            self.last_weights[tasks] = self._learn(norms[tasks] * to_plain, inputs)
        return self.last_weights * self._spread(to_plain, tasks, absent=1.0)

    def _learn(self, norms: Tensor, inputs: StepInputs) -> Tensor:
        """[P] weights of the plain losses; then theta learns from this step.

        Args:
            norms: [P], of the plain losses' gradients.
            inputs: of the step.
        """
        tasks, losses = inputs.tasks, inputs.losses
        is_first = self.initial_losses == "epoch" and self.epoch == 0
        is_measured = (self.num_initial[tasks] == 0) | is_first
        self.initial_sums[tasks] += torch.where(is_measured, losses, 0.0)
        self.num_initial[tasks] += is_measured.double()
        if is_first:
            return torch.ones_like(losses)
        weights = len(tasks) * self.logits.values[tasks].softmax(dim=0)
        ratios = losses * self.num_initial[tasks] / self.initial_sums[tasks]
        weighted = weights * norms
        target = weighted.mean() * (ratios / ratios.mean()) ** self.alpha
        slopes = (weighted - target).sign() * norms  # of equation 2, by weight
        self.logits.step(weights * (slopes - (weights * slopes).mean()), tasks)
        return weights
