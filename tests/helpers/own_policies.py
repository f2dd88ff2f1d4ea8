"""Policies of one's own for tests, written as a user would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Decay
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class SlowestFirst(LossPolicy):
    """Weights in proportion to smoothed losses."""

    decay: Decay = 0.5

    name = "SlowestFirst"
    state_names = ("smoothed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.smoothed = torch.ones(len(self.tasks), dtype=torch.float64)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        kept = self.decay * self.smoothed[inputs.tasks]
        self.smoothed[inputs.tasks] = kept + (1 - self.decay) * inputs.losses
        smoothed = self.smoothed[inputs.tasks]
        return smoothed / smoothed.sum()


class OneLength(GramianPolicy):
    """The sum of gradients that are brought to one length."""

    name = "OneLength"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        return 1 / gramian.diagonal().clamp(min=1e-12).sqrt()
