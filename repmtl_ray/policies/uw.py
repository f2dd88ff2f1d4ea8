"""UW: uncertainty weighting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class UW(LossPolicy):
    """Uncertainty weighting: sum_t L_t / (2 e^s_t) + s_t / 2, with s learnt by an Adam of its own.

    Needs positive losses: for a negative one the sum falls without bound as s falls. The s of an
    absent task does not move.

    Args:
        learning_rate: of s.

    Source:
        Kendall et al., CVPR 2018, with s = log sigma^2 from 0. The learning rate of s is that of
        nash-mtl's code (0.025), without weight decay. LibMTL learns s with the model's optimiser,
        from -0.5, and sums L_t / e^s_t + s_t / 2. State: s and its Adam.
    """

    learning_rate: Positive = 0.025

    name = "UW"
    needs_positive_losses = True
    state_names = ("scales",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales = TaskAdam(len(self.tasks), learning_rate=self.learning_rate)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd import scalarization

        formula = scalarization.UW(len(inputs.tasks))
        formula.log_var.data = self.scales.values[inputs.tasks]
        weights, slopes = derivatives_of(formula, inputs.losses, formula.log_var)
        self.scales.step(slopes, inputs.tasks)
        return weights
