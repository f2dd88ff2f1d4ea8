"""MoCo: min-norm weights followed by small steps, on moving averages of the task gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Number, Positive
from repmtl_ray.policies.base import StepInputs, weight_metrics
from repmtl_ray.policies.checks import SMALLEST_LOSS, require_losses
from repmtl_ray.policies.gramian import gramian_of
from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.simplex import shares_among, with_shares
from repmtl_ray.policies.torchjd_adapter import project_onto_simplex


@dataclass(kw_only=True, eq=False)
class MoCo(JacobianPolicy):
    """MoCo: y <- y - beta_k (y - g); lambda <- P(lambda - gamma_k (y y^T + rho) lambda); y^T lambda.

    The k-th step has beta / k^beta_sigma and gamma / k^gamma_sigma. Absent tasks keep y and lambda;
    the present ones share the rest. Any gradients are fine; with normalised ones the losses must not
    be negative.

    Args:
        beta, beta_sigma: rate of y and its decay; a task counts its own steps.
        gamma, gamma_sigma: rate of lambda and its decay.
        rho: pull of lambda to the uniform one.
        projection: back to the simplex, "softmax" (LibMTL) or "euclidean" (the paper).
        length: gradients enter with the length of their "loss" (LibMTL) or their "own" (the
            paper).

    Source:
        Fernando et al., "Mitigating gradient bias in multi-objective learning", ICLR 2023,
        arXiv:2210.12624, algorithm 1. All defaults are LibMTL's, from the authors' first code and
        behind the published tables: softmax and gradients of their loss's length, which the paper's
        algorithm does not have; the authors' later code (Trade-Off-MOL) has beta = gamma = rho =
        0.1, no decay, the Euclidean projection. y starts at zero, as in both codes. Heads have
        weight 1. State: the [T, N] y (T times the shared parameters), counts, lambda, step.
    """

    beta: Annotated[float, Number(above=0, at_most=1)] = 0.5
    beta_sigma: NonNegative = 0.5
    gamma: Positive = 0.1
    gamma_sigma: NonNegative = 0.5
    rho: NonNegative = 0.0
    projection: Literal["softmax", "euclidean"] = "softmax"
    length: Literal["loss", "own"] = "loss"

    name = "MoCo"
    state_names = ("averages", "num_averaged", "shares")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tasks = len(self.tasks)
        self.averages: Tensor | None = None
        self.num_averaged = torch.zeros(num_tasks, dtype=torch.float64)
        self.shares = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        tasks, lengths = inputs.tasks, self._lengths(jacobian, inputs)
        if self.averages is None:
            self.averages = jacobian.new_zeros(len(self.tasks), jacobian.shape[1])
        self.averages = self.averages.to(jacobian)
        self.num_averaged[tasks] += 1
        rates = (self.beta / self.num_averaged[tasks] ** self.beta_sigma).tolist()
        for task, row, length, rate in zip(tasks.tolist(), jacobian, lengths, rates, strict=True):
            self.averages[task].mul_(1 - rate).add_(row * length, alpha=rate)
        averages = self.averages[tasks]
        shares = shares_among(self.shares, tasks)
        gamma = self.gamma / (self.step + 1) ** self.gamma_sigma
        slope = gramian_of(averages).cpu() @ shares + self.rho * shares
        # Both projections ignore what is added to all numbers. Huge numbers would make the 1 of the
        # simplex vanish in rounding, so the smallest is subtracted.
        moved = shares - gamma * (slope - slope.min())
        is_softmax = self.projection == "softmax"
        shares = moved.softmax(dim=0) if is_softmax else project_onto_simplex(moved)
        self.shares = with_shares(self.shares, shares, tasks)
        return shares.to(averages) @ averages

    def _lengths(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        """[P] factors that the gradients enter with."""
        if self.length == "own":
            return jacobian.new_ones(len(inputs.tasks))
        names = [self.tasks[task] for task in inputs.tasks.tolist()]
        require_losses(self.name, names, self.step + 1, inputs.losses, positive=True)
        losses = inputs.losses.clamp(min=SMALLEST_LOSS)
        norms = torch.linalg.vector_norm(jacobian, dim=1, dtype=torch.float64).cpu()
        return torch.where(norms > 0, losses / norms, 0.0).to(jacobian)

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.shares)
