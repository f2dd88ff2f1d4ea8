"""PCD: priority-constrained descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies import torchjd_adapter
from repmtl_ray.policies.arguments import Decay, Fraction, NonNegative, OneTask
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class PCD(GramianPolicy):
    """Priority-constrained descent: the primary task's gradient, bent to help every other task too.

    Where the constraints contradict each other (opposed secondary gradients) the update is the
    primary gradient; where the primary gradient is zero, or its task absent, it is zero.

    Args:
        primary: the task that leads.
        tau: share of the progress along its own gradient that every other task is granted.
        beta: decay of the average squared norms.
        eps: added to them; absolute, so very small gradients (squared norm near it) are not
            rescaled.

    Source:
        "Not all objectives are born equal", TMLR 2026, arXiv:2606.29521. Averages and their step
        counts are kept per task, so that an absent task's wait; nothing is learnt while the primary
        task is absent. State: both.
    """

    primary: OneTask = None
    tau: Fraction = 0.02
    beta: Decay = 0.999
    eps: NonNegative = 1e-8

    name = "PCD"
    scale_free = False
    state_names = ("squared_norms", "num_averaged")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.squared_norms = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.num_averaged = torch.zeros_like(self.squared_norms)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        tasks, beta = inputs.tasks, self.beta
        is_primary = tasks == self.tasks.index(self.primary)
        weights = torch.zeros(len(tasks), dtype=torch.float64)
        if not bool(is_primary.any()):
            return weights
        squares = gramian.diagonal()
        self.squared_norms[tasks] = beta * self.squared_norms[tasks] + (1 - beta) * squares
        self.num_averaged[tasks] += 1
        averages = self.squared_norms[tasks] / (1 - beta ** self.num_averaged[tasks])
        size = (averages + self.eps).sqrt()
        scales = torch.where(size > 0, 1 / size, 0.0)
        primary_first = torch.argsort(is_primary.double(), descending=True, stable=True)
        weights[primary_first] = torchjd_adapter.pcd(
            gramian[primary_first][:, primary_first], scales[primary_first], self.tau
        )
        return weights
