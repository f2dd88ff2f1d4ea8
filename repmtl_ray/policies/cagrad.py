"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Number, Positive, ScaleOfWeights
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class CAGrad(GramianPolicy):
    """Near the mean gradient, the direction that serves the worst task best.

    A zero gradient, or opposed ones of equal size, make the shared update zero. A step whose solver
    fails takes equal weights, times `scale`
    and the number of tasks.

    Args:
        c: radius of the search, in units of the mean gradient's norm.
        scale: multiplies the weights. None is 1 / (1 + c^2), as in the official code; 1 is the
            paper's: g_0 + c |g_0| g_w / |g_w|, g_0 the mean.
        combined: "tasks", as in the official code; "one" as in the paper, LibMTL and TorchJD.
        norm_eps: g_w counts as zero below it, relative to the root of the summed squared norms.

    Source:
        Liu et al., NeurIPS 2021, algorithm 1, and the official code's scale: T / (1 + c^2) times
        the paper's. c is 0.4 in nash-mtl and FAMO (0.5 in LibMTL), which also shorten the result to
        norm 1 (`max_norm`). Solved by CLARABEL. State: the count of failures.
    """

    c: NonNegative = 0.4
    scale: Annotated[float | None, Number(above=0, or_none=True)] = None
    norm_eps: Positive = 1e-4
    combined: ScaleOfWeights = "tasks"

    name = "CAGrad"
    libraries = ("cvxpy",)
    solver = "CLARABEL"

    @property
    def _scale(self) -> float:
        return 1 / (1 + self.c**2) if self.scale is None else self.scale

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import CAGradWeighting

        return self._scale * CAGradWeighting(self.c, self.norm_eps)(gramian)

    def _fall_back(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        return self._scale * super()._fall_back(gramian, inputs)
