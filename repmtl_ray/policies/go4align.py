"""GO4Align: tasks of similar risk form groups, and a group has one weight."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, PositiveInt
from repmtl_ray.policies.base import LossPolicy, StepInputs

NUM_ROUNDS = 20
"""Of k-means on at most some dozen numbers."""


@dataclass(kw_only=True, eq=False)
class GO4Align(LossPolicy):
    """GO4Align: sum_t w_t L_t with w the mean over t's group of p_t sum_s L_s / L_t, where p <-
    normalised(p exp(-step_size L)) and groups come from k-means on those numbers.

    Needs positive losses, because it divides by them. An absent task keeps its p; the present ones
    share the rest, and at most as many groups are formed as there are tasks.

    Args:
        num_groups: 1 gives all tasks the mean weight.
        step_size: of p.

    Source:
        Shen et al., NeurIPS 2024, arXiv:2404.06486, adaptive group risk minimisation: its code's
        GO4ALIGN. step_size 1e-4 as there; 2 groups (its NYUv2 script takes 1 by default).
        k-means is scipy's (a dependency of TorchJD's extras; the code's kmeans_pytorch draws its
        first centres anew in each step): it starts at the values of ranks (i + 1/2) P / num_groups,
        so it needs no draw and does not depend on the tasks' order. State: p.
    """

    num_groups: PositiveInt = 2
    step_size: NonNegative = 1e-4

    name = "GO4Align"
    libraries = ("scipy",)
    needs_positive_losses = True
    state_names = ("log_shares",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log_shares = torch.zeros(len(self.tasks), dtype=torch.float64).log_softmax(dim=0)

    def loss_weights(self, inputs: StepInputs) -> Tensor:
        tasks, losses = inputs.tasks, inputs.losses
        log_total = torch.logsumexp(self.log_shares[tasks], dim=0)
        log_shares = (self.log_shares[tasks] - self.step_size * losses).log_softmax(dim=0)
        self.log_shares[tasks] = log_shares + log_total
        indicators = (log_shares + losses.sum().log() - losses.log()).exp()
        return group_means(indicators, min(self.num_groups, len(tasks)))


def group_means(values: Tensor, num_groups: int) -> Tensor:
    """[P]: each value replaced by the mean of its k-means group.

    Args:
        values: [P], float64, on the CPU.
        num_groups: at most P; equal values may leave groups empty.
    """
    from scipy.cluster import vq  # here, because scipy takes long to load

    ranks = (torch.arange(num_groups) + 0.5) * (len(values) / num_groups)
    start = values.sort().values[ranks.long()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, on empty groups
        _, labels = vq.kmeans2(
            values.numpy()[:, None], start.numpy()[:, None], iter=NUM_ROUNDS, minit="matrix"
        )
    groups = torch.from_numpy(labels).long()
    sums = values.new_zeros(num_groups).index_add(0, groups, values)
    counts = values.new_zeros(num_groups).index_add(0, groups, torch.ones_like(values))
    return (sums / counts)[groups]
