"""MoCo: min-norm weights followed by small steps, on moving averages of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repmtl_ray.policies.base import weight_metrics
from repmtl_ray.policies.gramian import gramian_of
from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.refusals import positive_losses
from repmtl_ray.policies.simplex import among, spread_over
from repmtl_ray.policies.task_pass import TaskPass

if TYPE_CHECKING:
    from torchjd.aggregation._utils import simplex as torchjd_simplex
else:
    torchjd_simplex = LazyModule("torchjd.aggregation._utils.simplex")


class MoCo(JacobianPolicy):
    """MoCo: y <- y - beta_k (y - g); lambda <- P(lambda - gamma_k (y y^T + rho) lambda); y^T lambda.

    The k-th step has beta / k^beta_sigma and gamma / k^gamma_sigma. Absent tasks keep y and lambda;
    the present ones share what the absent leave. Any gradients are fine; with normalised ones the
    losses must not be negative.

    Args:
        tasks, seed: as for every policy.
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

    name = "MoCo"
    remembered = ("averages", "num_averaged", "shares")

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        beta: float,
        beta_sigma: float,
        gamma: float,
        gamma_sigma: float,
        rho: float,
        projection: str,
        length: str,
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.beta, self.beta_sigma = beta, beta_sigma
        self.gamma, self.gamma_sigma, self.rho = gamma, gamma_sigma, rho
        self.euclidean = projection == "euclidean"
        self.by_loss = length == "loss"
        self.averages: Tensor | None = None
        self.num_averaged = torch.zeros(len(tasks), dtype=torch.float64)
        self.shares = torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        lengths = self._lengths(jacobian, tasks, task_pass)
        if self.averages is None:
            self.averages = jacobian.new_zeros(len(self.tasks), jacobian.shape[1])
        self.averages = self.averages.to(jacobian)
        self.num_averaged[tasks] += 1
        rates = (self.beta / self.num_averaged[tasks] ** self.beta_sigma).tolist()
        for task, row, length, rate in zip(tasks.tolist(), jacobian, lengths, rates, strict=True):
            self.averages[task].mul_(1 - rate).add_(row * length, alpha=rate)
        averages = self.averages[tasks]
        shares = among(self.shares, tasks)
        gamma = self.gamma / (self.step + 1) ** self.gamma_sigma
        slope = gramian_of(averages).cpu() @ shares + self.rho * shares
        # Both projections ignore a shift of all, and huge numbers would swallow the simplex's 1.
        moved = shares - gamma * (slope - slope.min())
        project = torchjd_simplex.project_onto_simplex if self.euclidean else _softmax
        shares = project(moved)
        self.shares = spread_over(self.shares, shares, tasks)
        return shares.to(averages) @ averages

    def _lengths(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        """[P] factors that the gradients enter with."""
        if not self.by_loss:
            return jacobian.new_ones(len(tasks))
        losses = positive_losses(
            self.name, self.tasks, self.step + 1, task_pass.plain_losses, tasks
        )[tasks]
        norms = torch.linalg.vector_norm(jacobian, dim=1, dtype=torch.float64).cpu()
        return torch.where(norms > 0, losses / norms, 0.0).to(jacobian)

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.shares)


def _softmax(values: Tensor) -> Tensor:
    return values.softmax(dim=0)
