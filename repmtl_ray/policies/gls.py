"""GLS: the geometric mean of losses."""

from __future__ import annotations

from torch import Tensor

from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.torchjd_adapter import derivatives_of


class GLS(LossPolicy):
    """The geometric mean of the present tasks' losses, as the exponential of their mean logarithm.

    Needs positive losses, because it takes their logarithm. With log losses the update is that of L
    itself.

    Source:
        Chennupati et al., "MultiNet++", CVPRW 2019, equation 6. State: none.
    """

    name = "GLS"
    needs_positive_losses = True

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd.scalarization import GeometricMean

        return derivatives_of(GeometricMean(), inputs.losses)[0]
