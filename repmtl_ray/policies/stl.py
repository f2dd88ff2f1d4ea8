"""stl: single-task learning."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_ray.policies.base import LossPolicy, StepInputs


class SingleTask(LossPolicy):
    """Single-task learning: one task, weight 1; the baseline that delta_p compares with.

    State: none.
    """

    name = "stl"

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return torch.ones_like(inputs.losses)
