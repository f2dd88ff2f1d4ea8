"""STCH: smooth Tchebycheff scalarization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegativeInt, Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.torchjd_adapter import derivatives_of


@dataclass(kw_only=True, eq=False)
class STCH(LossPolicy):
    """Smooth Tchebycheff: EW on log losses first, then mu logsumexp(log(L / nadir) / mu).

    The nadir is the mean losses of epoch `warmup_epochs` (counted from 0), which still trains as EW
    on log losses. A task that was absent throughout that epoch takes its first loss after it. Needs
    positive losses, because it takes their logarithm.

    Args:
        mu: a smaller one is closer to the maximum.
        warmup_epochs: EW epochs before the one that measures the nadir.
        sum_to: "tasks", T times the formula, as the official code and LibMTL have it and on EW's
            scale; "one", the paper's formula.

    Source:
        Lin et al., "Smooth Tchebycheff scalarization", ICML 2024, arXiv:2402.19078; warm-up and
        nadir from the official code (Xi-L/STCH, STCH_MTL): epochs 0 to 3 and epoch 4 for the nadir.
        State: epoch, nadir.
    """

    mu: Positive = 1.0
    warmup_epochs: NonNegativeInt = 4
    sum_to: Literal["tasks", "one"] = "tasks"

    name = "STCH"
    needs_positive_losses = True
    state_names = ("epoch", "loss_sums", "num_batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.epoch = 0
        self.loss_sums = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.num_batches = torch.zeros_like(self.loss_sums)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        from torchjd import scalarization

        tasks, losses = inputs.tasks, inputs.losses
        is_warm = self.epoch > self.warmup_epochs
        is_measured = self.epoch == self.warmup_epochs or (is_warm and self.num_batches[tasks] == 0)
        self.loss_sums[tasks] += torch.where(torch.as_tensor(is_measured), losses, 0.0)
        self.num_batches[tasks] += torch.as_tensor(is_measured).double()
        if not is_warm:
            return 1 / losses
        nadir = self.loss_sums[tasks] / self.num_batches[tasks]
        formula = scalarization.STCH(self.mu, weights=torch.ones_like(losses))
        shares = derivatives_of(formula, torch.log(losses / nadir))[0]
        return shares / losses * (len(tasks) if self.sum_to == "tasks" else 1)
