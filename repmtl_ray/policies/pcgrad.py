"""PCGrad: gradient surgery."""

from __future__ import annotations

from torch import Tensor

from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


class PCGrad(GramianPolicy):
    """Each gradient loses its part against every conflicting other, in random order; their sum.

    Opposed gradients cancel to zero; a zero gradient takes no part; parallel ones are summed.

    Source:
        Yu et al., "Gradient surgery", NeurIPS 2020, algorithm 1. State: none but the step.
    """

    name = "PCGrad"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import PCGradWeighting

        with self._drawing():
            return PCGradWeighting()(gramian)
