"""MoDo: multi-objective gradient with double sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import NonNegative, Positive
from repmtl_ray.policies.sub_batches import SubBatchPolicy


@dataclass(kw_only=True, eq=False)
class MoDo(SubBatchPolicy):
    """MoDo: lambda <- projection(lambda - gamma (J_1 J_2^T + rho) lambda), then the batch's lambda J.

    Any gradients are fine; the step of lambda grows with their squared norm.

    Args:
        gamma: rate of lambda.
        rho: pull of lambda to the uniform one.

    Source:
        Chen et al., "Three-way trade-off in multi-objective learning", NeurIPS 2023 and JMLR 2024,
        equations 2.9; rates 0.1 of the authors' code and TorchJD (LibMTL: gamma 0.001, three
        batches). The update follows the whole batch, the mean of its two halves where they have
        equally many labels. State: lambda.
    """

    gamma: Positive = 0.1
    rho: NonNegative = 0.1

    name = "MoDo"
    num_sub_batches = 2

    def shares_and_weights(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        # The projection ignores what is added to all numbers. Huge numbers would make the 1 of the
        # simplex vanish in rounding, so the smallest is subtracted.
        products = products - (products @ shares).min()
        shares = torchjd_adapter.modo(products, shares, self.gamma, self.rho)
        return shares, shares
