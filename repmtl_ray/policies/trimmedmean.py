"""TrimmedMean: the coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import NonNegativeInt
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.jacobian import JacobianPolicy


@dataclass(kw_only=True, eq=False)
class TrimmedMean(JacobianPolicy):
    """At each coordinate the mean of the task gradients without the largest and the smallest.

    With fewer than 2 `trim_number` + 1 tasks present it trims as many as leave one (the median).
    Any gradients are fine. It does not work at the representation, where it would compare
    coordinates of single samples.

    Args:
        trim_number: how many to leave out at each end.

    Source:
        Yin et al., "Byzantine-robust distributed learning", ICML 2018, definition 2. State: none.
    """

    trim_number: NonNegativeInt = 1

    name = "TrimmedMean"

    def __post_init__(self) -> None:
        super().__post_init__()
        num_needed = 2 * self.trim_number + 1
        if len(self.tasks) < num_needed:
            raise ValueError(
                f"policy {self.name!r}: trim_number={self.trim_number} needs at least {num_needed} "
                f"tasks, found {len(self.tasks)}."
            )

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd import aggregation

        trim_number = min(self.trim_number, (len(inputs.tasks) - 1) // 2)
        return aggregation.TrimmedMean(trim_number)(jacobian)
