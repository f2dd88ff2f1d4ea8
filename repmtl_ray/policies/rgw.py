"""RGW: random weights of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import ScaleOfWeights
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class RGW(GramianPolicy):
    """Random weights on task gradients, drawn anew in each step: the softmax of T normal numbers.

    As RLW, but heads keep weight 1. At the representation it costs one encoder backward. All T
    numbers are drawn whichever tasks are present.

    Args:
        sum_to: "one", as in the paper, or "tasks": T times that.

    Source:
        Lin et al., arXiv:2111.10603, algorithm 2, on gradients. State: none but the step.
    """

    sum_to: ScaleOfWeights = "one"

    name = "RGW"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import RandomWeighting

        all_tasks = torch.zeros(len(self.tasks), 1, dtype=torch.float64)
        total = 1.0 if self.sum_to == "one" else float(len(self.tasks))
        with self._drawing():
            return total * RandomWeighting()(all_tasks)[inputs.tasks]
