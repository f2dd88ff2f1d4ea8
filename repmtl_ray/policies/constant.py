"""Constant: weights of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Number, NumberPerTask, PerTask
from repmtl_ray.policies.base import LossPolicy, StepInputs


@dataclass(kw_only=True, eq=False)
class Constant(LossPolicy):
    """Weights that the user chose; taken as they are, not normalised.

    An absent task gets weight 0; the others keep theirs.

    Args:
        weights: per task.

    Source:
        None. State: none.
    """

    weights: Annotated[PerTask, NumberPerTask(Number(at_least=0), not_all_zero=True)]

    name = "Constant"

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)[inputs.tasks]
