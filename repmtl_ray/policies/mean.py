"""Mean: the mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_ray.policies.base import LossPolicy, StepInputs


class Mean(LossPolicy):
    """The mean of the losses: weights 1/T, whichever tasks are present.

    State: none.
    """

    name = "Mean"

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return torch.full_like(inputs.losses, 1 / len(self.tasks))
