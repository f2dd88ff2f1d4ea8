"""LDC-MTL: loss discrepancy control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.task_adam import TaskAdam


@dataclass(kw_only=True, eq=False)
class LDCMTL(LossPolicy):
    """Learnt weights s = sigmoid(a), and a penalty on the differences of neighbouring weighted
    losses: sum_t s_t N_t / sum s + lambda_ sum_t |s_t N_t - s_(t+1) N_(t+1)|.

    The N_t are normalised losses; the divisor sum s is not differentiated. a is learnt on the same
    total by an Adam of its own, in the same step. Neighbours are taken in the order of the tasks,
    of those that are present: the order of tasks matters. The a of an absent task does not move.
    Needs positive losses.

    Args:
        lambda_: weight of the differences.
        learning_rate: of a.
        normalization: N_t. "none": L_t. "first": L_t / r_t with r_t the task's first loss over the
            smallest first loss. "log": log(L_t / F_t) with F_t the task's first loss of each epoch;
            a task's weight then falls as its loss rises.

    Source:
        Xiao, Dong, Zou and Ji, "LDC-MTL: balancing multi-task learning through scalable loss
        discrepancy control", arXiv:2502.08585, and its official code: CelebA's script as it is by
        default (lambda 0.01, learning rate 0.001, a from 1). The paper's text is a bilevel problem;
        the code makes one joint step. "first" and "log" take the N_t of the NYUv2 and the QM9
        scripts (there with lambda 0.05). Deviations: those scripts' other routers are left out: a
        softmax of the decoders' features, which a policy does not see (NYUv2, Cityscapes), and
        sigmoid(relu(a)) (QM9); the code learns a with the model's optimiser. State: a, its Adam,
        first losses.
    """

    lambda_: NonNegative = 0.01
    learning_rate: Positive = 1e-3
    normalization: Literal["none", "first", "log"] = "none"

    name = "LDC-MTL"
    needs_positive_losses = True
    state_names = ("moves", "first_losses")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.moves = TaskAdam(len(self.tasks), learning_rate=self.learning_rate)  # a - 1
        self.first_losses = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64)

    def begin_epoch(self, epoch: int) -> None:
        if self.normalization == "log":
            self.first_losses = torch.full_like(self.first_losses, torch.nan)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        tasks = inputs.tasks
        first = self.first_losses[tasks]
        self.first_losses[tasks] = torch.where(first.isnan(), inputs.losses, first)
        with torch.enable_grad():
            a = (1 + self.moves.values[tasks]).requires_grad_()
            losses = inputs.losses.clone().requires_grad_()
            normalised = self._normalised(losses, self.first_losses[tasks])
            s = a.sigmoid()
            weighted = s * normalised
            total = weighted.sum() / s.sum().detach()
            total = total + self.lambda_ * (weighted[:-1] - weighted[1:]).abs().sum()
            weights, slopes = torch.autograd.grad(total, [losses, a])
        self.moves.step(slopes, tasks)
        return weights

    def _normalised(self, losses: Tensor, first: Tensor) -> Tensor:
        match self.normalization:
            case "first":
                return losses * first.min() / first
            case "log":
                return (losses / first).log()
            case _:
                return losses
