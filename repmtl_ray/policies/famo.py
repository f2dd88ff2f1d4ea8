"""FAMO: fast adaptive multi-task optimisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import NonNegative, Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.checks import SMALLEST_LOSS, require_losses
from repmtl_ray.policies.task_adam import TaskAdam


@dataclass(kw_only=True, eq=False)
class FAMO(LossPolicy):
    """FAMO: c sum_t z_t log L_t with z = softmax(w), where w follows how much each loss fell.

    After the model's step the losses of the same batch move w, so that slow tasks gain. Needs
    positive losses, because it takes their logarithm. Absent tasks are out of the softmax and their
    w does not move.

    Args:
        learning_rate, weight_decay: of w's own Adam.

    Source:
        Liu et al., "FAMO", NeurIPS 2023, algorithm 2: rate 0.025; decay 1e-3 (NYUv2; 0.01 for
        Cityscapes). The official code's default decay is 1e-5. State: w and its Adam.
    """

    learning_rate: Positive = 0.025
    weight_decay: NonNegative = 1e-3

    name = "FAMO"
    needs_positive_losses = True
    needs_losses_after_step = True
    state_names = ("logits",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.logits = TaskAdam(
            len(self.tasks), learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        self._before: StepInputs | None = None  # of this step, until its losses are seen again

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        self._before = inputs
        return torchjd_adapter.famo(inputs.losses, self.logits.values[inputs.tasks])

    def after_optimizer_step(self, plain_losses: Tensor) -> None:
        if self._before is None:  # no task was present
            return
        tasks, before = self._before.tasks, self._before.losses
        self._before = None
        after = plain_losses.detach().to("cpu", torch.float64)[tasks]
        names = [self.tasks[task] for task in tasks.tolist()]
        require_losses(self.name, names, self.step + 1, after, positive=True)
        fall = torch.log(before + 1e-8) - torch.log(after.clamp(min=SMALLEST_LOSS) + 1e-8)
        shares = torch.softmax(self.logits.values[tasks], dim=0)
        self.logits.step(shares * (fall - shares @ fall), tasks)
