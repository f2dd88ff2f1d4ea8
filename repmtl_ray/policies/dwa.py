"""DWA: dynamic weight average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs


@dataclass(kw_only=True, eq=False)
class DWA(LossPolicy):
    """Dynamic weight average: P softmax(r / temperature), where r is a task's mean loss in the last
    epoch over that in the epoch before.

    Weights are 1 in the first two epochs. Needs positive losses: a ratio of means near zero, or of
    either sign, says nothing about speed. A task's means are over the batches that held labels of
    it; without two means its r is 1.

    Args:
        temperature: a larger one gives more uniform weights.

    Source:
        Liu et al., "End-to-end multi-task learning with attention", CVPR 2019, equation 7. State:
        two epochs of means and the sums of the present epoch.
    """

    temperature: Positive = 2.0

    name = "DWA"
    needs_positive_losses = True
    state_names = ("loss_sums", "num_batches", "last_means", "earlier_means")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64)
        self.last_means, self.earlier_means = unknown, unknown.clone()
        self.loss_sums, self.num_batches = torch.zeros_like(unknown), torch.zeros_like(unknown)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        tasks = inputs.tasks
        self.loss_sums[tasks] += inputs.losses
        self.num_batches[tasks] += 1
        is_known = ~self.earlier_means[tasks].isnan()
        earlier, last = (
            torch.where(is_known, means[tasks], 1.0)
            for means in (self.earlier_means, self.last_means)
        )
        return torchjd_adapter.dwa(inputs.losses, last, earlier, self.temperature)

    def end_epoch(self) -> None:
        had_labels = self.num_batches > 0
        means = self.loss_sums / self.num_batches
        self.earlier_means = torch.where(had_labels, self.last_means, self.earlier_means)
        self.last_means = torch.where(had_labels, means, self.last_means)
        self.loss_sums, self.num_batches = torch.zeros_like(means), torch.zeros_like(means)
