"""GradVac: gradient vaccine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import Fraction, Positive
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class GradVac(GramianPolicy):
    """Each gradient is turned until its cosine with every other reaches that pair's moving average.

    Opposed gradients cancel at first; a zero gradient takes no part. Where a pair has been parallel
    for long (average near 1) the correction is large, at most of the order of 1 / eps.

    Args:
        beta: share of the new cosine in the average.
        eps: added to denominators, relative to the root of the summed squared norms.

    Source:
        Wang et al., "Gradient vaccine", ICLR 2021, equations 3 and 4, whole-model grouping;
        averages start at 0. State: the [T, T] averages.
    """

    beta: Fraction = 0.5
    eps: Positive = 1e-8

    name = "GradVac"
    state_names = ("cosines",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cosines = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        pairs = torch.meshgrid(inputs.tasks, inputs.tasks, indexing="ij")
        with self._drawing():
            weights, self.cosines[pairs] = torchjd_adapter.gradvac(
                gramian, self.cosines[pairs], self.beta, self.eps
            )
        return weights
