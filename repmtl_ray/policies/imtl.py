"""IMTL: IMTL-L's scales of the losses and IMTL-G's weights of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.task_adam import TaskAdam


@dataclass(kw_only=True, eq=False)
class IMTL(GramianPolicy):
    """IMTL: the combination with equal projections on the gradients of e^s_t L_t, s learnt.

    Needs positive losses, as IMTL-L. Heads follow e^s_t L_t. The s of an absent task does not move;
    zero, dependent and opposed gradients are as for IMTL-G.

    Args:
        learning_rate: of s, which has an Adam of its own.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, algorithm 1: equation 3 for
        the weights (IMTL-G), equation 8 for s (IMTL-L), which a step learns after it was used.
        LibMTL learns s with the model's optimiser; here it has IMTL-L's rate. State: s, its Adam.
    """

    learning_rate: Positive = 0.025

    name = "IMTL"
    needs_positive_losses = True
    state_names = ("scales",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales = TaskAdam(len(self.tasks), learning_rate=self.learning_rate)
        self._factors = torch.ones(0, dtype=torch.float64)  # [P], of this step's task gradients

    def _observe(self, inputs: StepInputs) -> None:
        factors = self.scales.values.exp()[inputs.tasks]
        self.scales.step(factors * inputs.losses - 1, inputs.tasks)
        self._factors = factors * inputs.to_plain

    def _compared(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        return gramian * torch.outer(self._factors, self._factors)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import IMTLGWeighting

        return self._factors * IMTLGWeighting()(gramian)

    def _official_head_weights(self, inputs: StepInputs) -> Tensor:
        return self._spread(self._factors, inputs.tasks, absent=1.0)
