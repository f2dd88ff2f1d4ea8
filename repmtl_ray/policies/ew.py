"""EW: equal weights."""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_ray.policies.base import LossPolicy, StepInputs


class EW(LossPolicy):
    """Equal weights: the sum of the losses, or of their logarithms with `log_losses`.

    An absent task gets weight 0; the others keep theirs.

    Source:
        The baseline "EW" of LibMTL and of Rep-MTL's tables. Weights are 1, so they sum to T.
        State: none.
    """

    name = "EW"

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return torch.ones_like(inputs.losses)
