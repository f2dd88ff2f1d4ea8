"""GradNorm: weights that bring the tasks' gradient norms to where their training rates want them.

Owns the method; the gradients at the last shared layer are `TaskPass.last_layer_jacobian`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_ray.policies.base import Policy, weight_metrics
from repmtl_ray.policies.memory import demand_names, read_back, written
from repmtl_ray.policies.refusals import positive_losses, refuse_non_finite
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.task_pass import TaskPass


class GradNorm(Policy):
    """GradNorm: w = P softmax(theta), theta learnt so that the norms of w_t grad L_t tend to the
    mean norm times r_t^alpha.

    r_t is L_t by its initial value, by the mean of those ratios over tasks. Norms are taken at the
    last shared layer, where the backward passes end: about one encoder backward and a bit. Needs
    positive losses: it takes their ratio. An absent task is out of the softmax and the mean, and
    its theta does not move. A zero gradient leaves its theta to the others' pull; all other
    gradients are fine, as only their norms count.

    Args:
        tasks, seed: as for every policy.
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

    name = "GradNorm"
    needs_positive_losses = True
    remembered = ("initial_sums", "num_initial", "epoch")

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        alpha: float,
        learning_rate: float,
        initial_losses: str,
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.alpha = alpha
        self.num_first_epochs = {"step": 0, "epoch": 1}[initial_losses]
        self.logits = TaskAdam(len(tasks), learning_rate=learning_rate)
        self.initial_sums = torch.zeros(len(tasks), dtype=torch.float64)
        self.num_initial = torch.zeros_like(self.initial_sums)
        self.epoch = 0
        self.last_weights: Tensor | None = None

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def backward(self, task_pass: TaskPass) -> None:
        norms = task_pass.last_layer_jacobian().double().norm(dim=1).cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, norms.isfinite())
        tasks = task_pass.present.cpu().nonzero().flatten()
        losses = positive_losses(
            self.name, self.tasks, self.step + 1, task_pass.plain_losses, tasks
        )
        to_plain = losses if task_pass.log_losses else torch.ones_like(losses)
        self.last_weights = torch.zeros_like(losses)
        if len(tasks):
            self.last_weights[tasks] = self._weights(
                (norms * to_plain)[tasks], losses[tasks], tasks
            )
        task_pass.finish_with_weights(self.last_weights * to_plain)
        self.step += 1

    def _weights(self, norms: Tensor, losses: Tensor, tasks: Tensor) -> Tensor:
        """[P] weights of the plain losses; then theta learns from this step.

        Args:
            norms: [P], of the plain losses' gradients.
            losses: [P], plain.
            tasks: [P], their indices.
        """
        first = self.epoch < self.num_first_epochs
        measured = (self.num_initial[tasks] == 0) | first
        self.initial_sums[tasks] += torch.where(measured, losses, 0.0)
        self.num_initial[tasks] += measured.double()
        if first:
            return torch.ones_like(losses)
        weights = len(tasks) * self.logits.values[tasks].softmax(dim=0)
        ratios = losses * self.num_initial[tasks] / self.initial_sums[tasks]
        weighted = weights * norms
        target = weighted.mean() * (ratios / ratios.mean()) ** self.alpha
        slopes = (weighted - target).sign() * norms  # of equation 2, by weight
        self.logits.step(weights * (slopes - (weights * slopes).mean()), tasks)
        return weights

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.last_weights)

    def _state(self) -> dict[str, Any]:
        return {**written(self, self.remembered), **self.logits.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        demand_names((*self.remembered, *TaskAdam.names), state, self.name)
        self.logits.load_state({name: state.pop(name) for name in TaskAdam.names}, self.name)
        read_back(self, self.remembered, state, self.name)
