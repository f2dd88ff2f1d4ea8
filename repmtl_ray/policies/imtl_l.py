"""IMTL-L: losses brought to one scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class IMTLL(LossPolicy):
    """IMTL-L: sum_t e^s_t L_t - s_t, with s learnt by an Adam of its own; e^s_t L_t tends to 1.

    Needs positive losses, as UW does. The s of an absent task does not move.

    Args:
        learning_rate: of s.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, equation 8. LibMTL learns s
        with the model's optimiser; here it has UW's rate. State: s and its Adam.
    """

    learning_rate: Positive = 0.025

    name = "IMTL-L"
    needs_positive_losses = True
    state_names = ("scales",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales = TaskAdam(len(self.tasks), learning_rate=self.learning_rate)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd import scalarization

        formula = scalarization.IMTLL(len(inputs.tasks))
        formula.log_scale.data = self.scales.values[inputs.tasks]
        weights, slopes = derivatives_of(formula, inputs.losses, formula.log_scale)
        self.scales.step(slopes, inputs.tasks)
        return weights
