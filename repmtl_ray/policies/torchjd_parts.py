"""Policies that compare gradients of independent parts of a batch: MoDo and SDMGrad.

Their weights are found from A = J_1 J_2^T, the Jacobians of two independent samples. The papers draw
a batch for each; here the rows of the one global batch are dealt out in turn, which costs no data
and does not depend on the number of workers. Deviation: all parts come from one forward pass and
share its batch statistics, so where the encoder normalises batches they are not wholly independent.
Costs an encoder backward for each task of two parts, and one more.

Neither allows `gradients="representation"`: a representation gradient belongs to a sample, and
those of different samples have no inner product. Heads follow the whole batch with weight 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.base import GradientPolicy, weight_metrics
from repmtl_ray.policies.gramian import products_of
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.memory import read_back, written
from repmtl_ray.policies.refusals import refuse_non_finite
from repmtl_ray.policies.simplex import among, spread_over
from repmtl_ray.policies.task_pass import TaskPass

if TYPE_CHECKING:
    from torchjd import aggregation
else:
    aggregation = LazyModule("torchjd.aggregation")


class PartsPolicy(GradientPolicy):
    """Weights of the shared gradient come from two parts' Jacobians, and shares that are remembered.

    Absent tasks keep their shares; the present ones divide the rest. A task without a label in a
    part counts as a zero gradient there.
    """

    name: ClassVar[str]
    needs_parts = True
    num_parts: int
    """Two to compare; with three the shared parameters follow the third alone, else the batch."""

    def __init__(self, tasks: Sequence[str], *, seed: int) -> None:
        super().__init__(tasks, seed=seed)
        self.shares = torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)
        self.last_weights: Tensor | None = None

    @final
    def backward(self, task_pass: TaskPass) -> None:
        parts = task_pass.part_gradients(self.num_parts)
        first, second = (task_pass.jacobian(part) for part in parts[:2])
        finite = (first.isfinite() & second.isfinite()).all(dim=1).cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, finite)
        tasks = task_pass.present.cpu().nonzero().flatten()
        self.last_weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        if len(tasks):
            products = products_of(first, second).cpu()
            shares, weights = self._shares(products[tasks][:, tasks], among(self.shares, tasks))
            self.shares = spread_over(self.shares, shares, tasks)
            self.last_weights[tasks] = weights
        task_pass.finish_with_weights(
            self.last_weights,
            head_weights=self._head_weights(task_pass),
            gradients=parts[2] if self.num_parts == 3 else None,
        )
        self.step += 1

    @abstractmethod
    def _shares(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """[P] new shares, summing to 1, and [P] weights.

        Args:
            products: [P, P], float64, on the CPU: J_1 J_2^T of the tasks that are present.
            shares: [P], the last ones.
        """

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.last_weights)

    def _state(self) -> dict[str, Any]:
        return written(self, ("shares",))

    def _load_state(self, state: dict[str, Any]) -> None:
        read_back(self, ("shares",), state, self.name)


class MoDo(PartsPolicy):
    """MoDo: lambda <- projection(lambda - gamma (J_1 J_2^T + rho) lambda), then the batch's lambda J.

    Any gradients are fine; the step of lambda grows with their squared norm.

    Args:
        tasks, seed: as for every policy.
        gamma: rate of lambda.
        rho: pull of lambda to the uniform one.

    Source:
        Chen et al., "Three-way trade-off in multi-objective learning", NeurIPS 2023 and JMLR 2024,
        equations 2.9; rates 0.1 of the authors' code and TorchJD (LibMTL: gamma 0.001, three
        batches). The update follows the whole batch, the mean of its two halves where they have
        equally many labels. State: lambda.
    """

    name = "MoDo"
    num_parts = 2

    def __init__(self, tasks: Sequence[str], *, seed: int, gamma: float, rho: float) -> None:
        super().__init__(tasks, seed=seed)
        self.gamma, self.rho = gamma, rho

    def _shares(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        weighting: Any = aggregation.MoDoWeighting(self.gamma, self.rho)
        weighting._lambda = shares
        weighting._state_key = (len(shares), products.dtype, products.device)
        # The projection ignores a shift of all, and huge products would swallow the simplex's 1.
        found = weighting(products - (products @ shares).min())
        return found, found


class SDMGrad(PartsPolicy):
    """SDMGrad: w from some steps of projected descent on w^T A (w + 2 lambda w~) / 2 of the scaled
    A = J_1 J_2^T, w~ uniform; then (w + lambda w~) / (1 + lambda) weighs a third part's gradients.

    Any gradients are fine: A is divided by the mean of its diagonal's roots, squared.

    Args:
        tasks, seed: as for every policy.
        lambda_: pull of the update to the mean gradient.
        learning_rate, momentum, num_iterations: of the descent, which starts at the last w.
        num_parts: 3 as in the paper: the update follows the third part alone; or 2: it follows the
            whole batch, less noisy but not independent of w.

    Source:
        Xiao et al., "Direction-oriented multi-objective learning", NeurIPS 2023, arXiv:2305.18409,
        algorithm 1; lambda 0.3, rate 10, momentum 0.5, 20 iterations of the authors' code and
        TorchJD (LibMTL: rate 5). State: w.
    """

    name = "SDMGrad"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        lambda_: float,
        learning_rate: float,
        momentum: float,
        num_iterations: int,
        num_parts: int,
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.num_parts = num_parts
        self.lambda_ = lambda_
        self.descent = (learning_rate, momentum, num_iterations)

    def _shares(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        weighting: Any = aggregation.SDMGradWeighting(*self.descent, self.lambda_)
        weighting._w = shares
        weighting._state_key = (len(shares), products.dtype, products.device)
        # TorchJD adds 1e-8 to the scale; here it is relative to the products.
        size = products.abs().max()
        weights = weighting(products / torch.where(size > 0, size, 1.0))
        return weighting._w, weights
