"""SDMGrad: stochastic direction-oriented multi-objective gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import Decay, Integer, NonNegative, Positive, PositiveInt
from repmtl_ray.policies.sub_batches import SubBatchPolicy


@dataclass(kw_only=True, eq=False)
class SDMGrad(SubBatchPolicy):
    """SDMGrad: w from some steps of projected descent on w^T A (w + 2 lambda w~) / 2 of the scaled
    A = J_1 J_2^T, w~ uniform; then (w + lambda w~) / (1 + lambda) weighs the gradients of a third
    sub-batch.

    Any gradients are fine: A is divided by the mean of its diagonal's roots, squared.

    Args:
        lambda_: pull of the update to the mean gradient.
        learning_rate, momentum, num_iterations: of the descent, which starts at the last w.
        num_parts: 3 as in the paper: the update follows the third sub-batch alone; or 2: it follows
            the whole batch, with less noise but not independent of w.

    Source:
        Xiao et al., "Direction-oriented multi-objective learning", NeurIPS 2023, arXiv:2305.18409,
        algorithm 1; lambda 0.3, rate 10, momentum 0.5, 20 iterations of the authors' code and
        TorchJD (LibMTL: rate 5). State: w.
    """

    lambda_: NonNegative = 0.3
    learning_rate: Positive = 10.0
    momentum: Decay = 0.5
    num_iterations: PositiveInt = 20
    num_parts: Annotated[int, Integer(at_least=2, at_most=3)] = 3

    name = "SDMGrad"

    @property
    def num_sub_batches(self) -> int:
        return self.num_parts

    def shares_and_weights(self, products: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        # TorchJD adds 1e-8 to the scale; here it is relative to the products.
        size = products.abs().max()
        return torchjd_adapter.sdmgrad(
            products / torch.where(size > 0, size, 1.0),
            shares,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            num_iterations=self.num_iterations,
            lambda_=self.lambda_,
        )
