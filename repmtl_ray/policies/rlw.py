"""RLW: random weights of losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import ScaleOfWeights
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class RLW(LossPolicy):
    """Random weights, drawn anew in each step: the softmax of T normal numbers.

    All T numbers are drawn whichever tasks are present; the share of an absent task is not given
    to the others.

    Args:
        sum_to: "one", as in the paper, or "tasks": T times that, the scale of EW.

    Source:
        Lin et al., "Reasonable effectiveness of random weighting", arXiv:2111.10603, algorithm 2.
        Weights sum to 1, EW's to T: with a penalty or without Adam the two need different learning
        rates. State: none but the step.
    """

    sum_to: ScaleOfWeights = "one"

    name = "RLW"

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd.scalarization import Random

        losses = torch.zeros(len(self.tasks), dtype=torch.float64)
        with self._drawing():
            (weights,) = derivatives_of(Random(), losses)
        total = 1.0 if self.sum_to == "one" else float(len(self.tasks))
        return total * weights[inputs.tasks]
