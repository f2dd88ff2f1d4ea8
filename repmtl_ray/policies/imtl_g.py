"""IMTL-G: equal projections on every task gradient."""

from __future__ import annotations

from torch import Tensor

from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


class IMTLG(GramianPolicy):
    """IMTL-G: the combination with equal projections on every task gradient; weights sum to 1.

    A zero gradient has weight 0; dependent gradients go through a pseudo-inverse; where the weights
    would sum to zero (opposed gradients) they are zero. Weights may be negative.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, equation 3, as generalised
        in arXiv:2406.16232. State: none.
    """

    name = "IMTL-G"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import IMTLGWeighting

        return IMTLGWeighting()(gramian)
