"""Aligned-MTL: gradients whose principal components have one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class AlignedMTL(GramianPolicy):
    """Aligned-MTL: the mean of gradients whose principal components were brought to one size.

    Components without size (zero, dependent or opposed gradients) are left out.

    Args:
        scale_mode: the size: the "min", "median" or "rmse" (root mean) singular value.

    Source:
        Senushkin et al., CVPR 2023, algorithm 1, uniform preference; at the representation it is
        their Aligned-MTL-UB. State: none.
    """

    scale_mode: Literal["min", "median", "rmse"] = "min"

    name = "Aligned-MTL"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import AlignedMTLWeighting

        return AlignedMTLWeighting(scale_mode=self.scale_mode)(gramian)
