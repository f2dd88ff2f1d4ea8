"""Krum: the gradients that lie closest to their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import NonNegativeInt, PositiveInt
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class Krum(GramianPolicy):
    """The mean of the gradients that lie closest to their neighbours.

    With fewer present tasks than the method needs (`n_byzantine` + 3, or `n_selected`) it is the
    mean of all present ones. Any gradients are fine.

    Args:
        n_byzantine: how many tasks may be outliers.
        n_selected: how many gradients to take.

    Source:
        Blanchard et al., "Machine learning with adversaries", NeurIPS 2017. State: none.
    """

    n_byzantine: NonNegativeInt = 0
    n_selected: PositiveInt = 1

    name = "Krum"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_needed = max(self.n_byzantine + 3, self.n_selected)
        if len(self.tasks) < self.num_needed:
            raise ValueError(
                f"policy {self.name!r}: n_byzantine={self.n_byzantine} and "
                f"n_selected={self.n_selected} need at least {self.num_needed} tasks, found "
                f"{len(self.tasks)}."
            )

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import KrumWeighting

        if len(inputs.tasks) < self.num_needed:
            return self._fall_back(gramian, inputs)
        return KrumWeighting(self.n_byzantine, self.n_selected)(gramian)
