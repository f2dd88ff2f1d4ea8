"""UW-SO: soft optimal uncertainty weighting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs


@dataclass(kw_only=True, eq=False)
class UWSO(LossPolicy):
    """Weights are the softmax of 1 / (temperature L_t): the smaller loss has the larger weight.

    Weights sum to 1 over the present tasks and are not differentiated. They depend on the units of
    the losses, so the temperature must be searched for each problem. Needs positive losses.

    Args:
        temperature: a larger one gives more uniform weights.

    Source:
        Kirchdorfer et al., "Analytical uncertainty-based loss weighting in multi-task learning",
        GCPR 2024, arXiv:2408.07985. The minimum of UW's sum over s is at weights 1 / L_t (the paper's
        UW-O, which is "EW" with log losses); the softmax makes it UW-SO. The paper tunes the
        temperature for each data set and network; 1 is third-party code's. That code adds 1e-8 to
        L_t; here a loss below 1e-30 counts as 1e-30. State: none.
    """

    temperature: Positive = 1.0

    name = "UW-SO"
    needs_positive_losses = True

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return (1 / (self.temperature * inputs.losses)).softmax(dim=0)
