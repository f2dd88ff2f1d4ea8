"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Positive
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class CAGrad(GramianPolicy):
    """Near the mean gradient, the direction that serves the worst task best.

    A zero gradient, or opposed ones of equal size, make the shared update zero. A step whose solver
    fails takes equal weights, times `scale`.

    Args:
        c: radius of the search, in units of the mean gradient's norm.
        scale: multiplies the weights. 1 is the paper's: g_0 + c |g_0| g_w / |g_w|, g_0 the
            mean. The official code takes 1 / (1 + c^2), nash-mtl's T / (1 + c^2).
        norm_eps: g_w counts as zero below it, relative to the root of the summed squared norms.

    Source:
        Liu et al., NeurIPS 2021, algorithm 1. c is 0.4 in nash-mtl and FAMO (0.5 in LibMTL). Solved
        by CLARABEL. State: the count of failures.
    """

    c: NonNegative = 0.4
    scale: Positive = 1.0
    norm_eps: Positive = 1e-4

    name = "CAGrad"
    solver = "CLARABEL"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import CAGradWeighting

        return self.scale * CAGradWeighting(self.c, self.norm_eps)(gramian)

    def _fall_back(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        return self.scale * super()._fall_back(gramian, inputs)
