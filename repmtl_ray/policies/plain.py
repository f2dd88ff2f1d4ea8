"""Policies with fixed weights: EW, Mean, Constant and single-task learning. None has a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from repmtl_ray.policies.base import LossPolicy


class FixedWeights(LossPolicy):
    """Weighs every task by a number of its own, always the same.

    An absent task gets weight 0; the others keep theirs.

    Args:
        tasks, seed: as for every policy.
        weights: by task.
    """

    name: ClassVar[str]

    def __init__(self, tasks: Sequence[str], *, seed: int, weights: Sequence[float]) -> None:
        super().__init__(tasks, seed=seed)
        self.fixed = tuple(weights)

    def weights(self, losses: Tensor, present: Tensor) -> Tensor:
        fixed = torch.tensor(self.fixed, dtype=torch.float64, device=losses.device)
        return torch.where(present, fixed, 0.0)


class EW(FixedWeights):
    """Equal weights: the sum of the losses, of their logarithms with `log_losses`.

    Source:
        The baseline "EW" of LibMTL and of Rep-MTL's tables. Weights are 1, so they sum to T.
    """

    name = "EW"

    def __init__(self, tasks: Sequence[str], *, seed: int) -> None:
        super().__init__(tasks, seed=seed, weights=[1.0] * len(tasks))


class SingleTask(EW):
    """Single-task learning: one task, weight 1; the baseline that delta_p compares with."""

    name = "stl"


class Mean(FixedWeights):
    """The mean of the losses: weights 1/T, whoever is present."""

    name = "Mean"

    def __init__(self, tasks: Sequence[str], *, seed: int) -> None:
        super().__init__(tasks, seed=seed, weights=[1 / len(tasks)] * len(tasks))


class Constant(FixedWeights):
    """Weights that the user chose; taken as they are, not normalised."""

    name = "Constant"
