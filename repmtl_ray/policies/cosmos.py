"""COSMOS: a weighted sum and a cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Number, NumberPerTask, PerTask
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class COSMOS(LossPolicy):
    """A weighted sum of losses minus lambda times the cosine of losses and weights.

    Needs positive losses: the cosine compares directions within the positive orthant. This is the
    objective only: the full method also feeds the preference to the model and draws it anew in each
    step.

    Args:
        lambda_: of the cosine; the paper's lie between 0.01 and 8.
        weights: the preference, per task.

    Source:
        Ruchte and Grabocka, arXiv:2103.13392, equation 4. State: none.
    """

    lambda_: NonNegative
    weights: Annotated[PerTask, NumberPerTask(Number(above=0))] = 1.0

    name = "COSMOS"
    needs_positive_losses = True

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd import scalarization

        preference = torch.tensor(self.weights, dtype=torch.float64)[inputs.tasks]
        return derivatives_of(scalarization.COSMOS(self.lambda_, preference), inputs.losses)[0]
