"""PBI: penalty-based boundary intersection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Number, NumberPerTask, PerTask
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class PBI(LossPolicy):
    """PBI: the length of the losses along a direction, plus theta times their distance from it.

    Needs positive losses: the direction starts at the ideal point, which is a lower bound of the
    losses. Weights may be negative: a loss that is too small for the direction is raised.

    Args:
        theta: of the distance.
        weights: the direction, per task.
        reference: the ideal point, per task.

    Source:
        Zhang and Li, "MOEA/D", 2007, section III-B-3; theta 5 as there. State: none.
    """

    theta: NonNegative = 5.0
    weights: Annotated[PerTask, NumberPerTask(Number(above=0))] = 1.0
    reference: Annotated[PerTask, NumberPerTask()] = 0.0

    name = "PBI"
    needs_positive_losses = True

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd import scalarization

        direction = torch.tensor(self.weights, dtype=torch.float64)[inputs.tasks]
        ideal = torch.tensor(self.reference, dtype=torch.float64)[inputs.tasks]
        return derivatives_of(scalarization.PBI(self.theta, direction, ideal), inputs.losses)[0]
