"""FairGrad: alpha-fair resource allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Integer, NonNegative, ScaleOfWeights
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class FairGrad(GramianPolicy):
    """Alpha-fair resource allocation: G x = x^(-1 / alpha).

    A task with a zero gradient has no solution and gets weight 0. Opposed gradients have none
    either: the weights are where least squares stops, finite. A step whose solver fails takes equal
    weights.

    Args:
        alpha: 0 is the mean, 1 proportional fairness, a large one the worst task's.
        max_iters: of least squares; None is 100 times T.
        combined, max_norm: as the official code; "one" and 0 are the equation, LibMTL and TorchJD.

    Source:
        Ban and Ji, ICML 2024, arXiv:2402.15638, equation 4; alpha 2 on NYUv2 and Cityscapes. The
        official code multiplies the combined gradient by T and shortens it to norm 1. Solved at
        trace 1 and scaled back by trace^(-alpha / (1 + alpha)), which the equation allows exactly.
        Solved by scipy's least_squares. State: the count of failures.
    """

    alpha: NonNegative = 2.0
    max_iters: Annotated[int | None, Integer(at_least=1, or_none=True)] = None
    combined: ScaleOfWeights = "tasks"
    max_norm: NonNegative = 1.0

    name = "FairGrad"
    libraries = ("scipy",)
    solver = "scipy.optimize.least_squares"
    scale_free = False

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import FairGradWeighting

        has_gradient, trace = gramian.diagonal() > 0, gramian.trace()
        weights = torch.zeros(len(inputs.tasks), dtype=torch.float64)
        weights[has_gradient] = FairGradWeighting(self.alpha, self.max_iters)(
            gramian[has_gradient][:, has_gradient] / trace
        )
        return weights * trace ** (-self.alpha / (1 + self.alpha))
