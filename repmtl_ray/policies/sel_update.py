"""Sel-Update: selective task group updates, with one optimiser step for each group of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from repmtl_ray.policies.affinity_propagation import clusters_of
from repmtl_ray.policies.arguments import Fraction, NonNegativeInt
from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import SMALLEST_LOSS
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class SelUpdate(Policy):
    """Groups of tasks take turns: each has its own forward pass and optimiser step on every batch.

    A group's step follows the sum of its losses; the heads of the other tasks have no gradient, so
    no optimiser moves them. The order of the groups is drawn for every batch. If there is one group
    alone it steps twice.

    The affinity from task i to task k is (1 - L_k now / L_k before) / group size, for every i in
    the group. Inside a group it counts for i = k only if it is not negative, and as -max of both if
    those of i and k have different signs. A moving average B of it makes groups anew for every
    batch after the first ones: affinity propagation clusters the mean of B_ik / B_kk and its
    transpose. Groups stay as they are while a B_kk is 0 or the clustering does not converge.

    Args:
        beta: share of a new affinity in its average: 0.001 for NYUD and PASCAL, 0.0001 for
            Taskonomy.
        warmup_steps: batches in which every task is a group.
        credit: whose step changed the losses. The official code reads them before a group's own
            step, so the change is the previous group's, and books it to the "present" group;
            "previous" books it to the group that made the step.

    Source:
        Jeong and Yoon, "Selective task group updates for multi-task optimization", ICLR 2025,
        arXiv:2502.11986; rule and defaults of the official code. The change that the last group of
        a batch makes is never read, as there. The code tries affinity propagation again with
        stricter convergence where it fails, which cannot succeed: once here. A task without a label
        in the batch is in no group of it. The penalty of Rep-MTL is added to every group's update,
        for the shared parameters and the heads of the group. Batch-norm statistics count every
        forward pass, as in the code. State: averages, groups. Costs one forward pass and one
        encoder backward for each group.
    """

    beta: Fraction = 0.001
    warmup_steps: NonNegativeInt = 101
    credit: Literal["present", "previous"] = "present"

    name = "Sel-Update"
    needs_positive_losses = True
    state_names = ("affinities", "groups")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tasks = len(self.tasks)
        self.affinities = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
        self.groups = torch.arange(num_tasks)
        self._turns: list[Tensor] = []
        self._last_group: Tensor | None = None
        self._before = torch.zeros(num_tasks, dtype=torch.float64)

    @property
    def wants_another_update(self) -> bool:
        return bool(self._turns)

    def backward(self, task_pass: TaskPass) -> None:
        inputs = self._inputs_of(task_pass)
        if not self._turns:
            self._begin_batch(inputs)
        group = self._turns.pop(0)
        self._observe(inputs, group)
        weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        weights[group] = 1.0
        self.last_weights = self.last_head_weights = weights
        task_pass.finish_with_weights(weights)
        for weight, head in zip(weights.tolist(), task_pass.head_parameters, strict=True):
            for parameter in head if weight == 0 else ():
                parameter.grad = None
        if not self._turns:
            self.step += 1

    def _begin_batch(self, inputs: StepInputs) -> None:
        """Makes the groups of a batch and their order."""
        with self._drawing():
            if self.step >= self.warmup_steps:
                self._regroup()
            numbers = self.groups.unique()
            order = numbers[torch.randperm(len(numbers))].tolist()
        present = torch.zeros(len(self.tasks), dtype=torch.bool)
        present[inputs.tasks] = True
        turns = [((self.groups == number) & present).nonzero().flatten() for number in order]
        turns = [group for group in turns if len(group)]
        if not turns:  # no label at all: an update of nothing
            turns = [torch.zeros(0, dtype=torch.int64)]
        self._turns = turns * 2 if len(numbers) == 1 else turns
        self._last_group = None

    def _observe(self, inputs: StepInputs, group: Tensor) -> None:
        """Learns from the losses before a group's step."""
        now = self._spread(inputs.losses, inputs.tasks, absent=0.0)
        credited = group if self.credit == "present" else self._last_group
        if self._last_group is not None and credited is not None:
            known = [k for k in inputs.tasks.tolist() if self._before[k] > SMALLEST_LOSS]
            gains = torch.zeros_like(now)
            gains[known] = (1 - now[known] / self._before[known]) / len(credited)
            self._average(gains.tolist(), credited.tolist(), known)
        self._before, self._last_group = now, group

    def _average(self, gains: list[float], group: list[int], known: list[int]) -> None:
        for i in group:
            for k in known:
                gain = gains[k]
                if k in group:
                    if i not in known or (i == k and gain < 0):
                        continue
                    if gain * gains[i] < 0:
                        gain = -max(gain, gains[i])
                self.affinities[i, k] += self.beta * (gain - float(self.affinities[i, k]))

    def _regroup(self) -> None:
        own = self.affinities.diagonal()
        if not bool((own > 0).all()):
            return
        ratios = self.affinities / own
        clusters = clusters_of((ratios + ratios.T) / 2)
        if clusters is not None:
            self.groups = clusters

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self._turns = []  # what is loaded stands between two batches

    def metrics(self) -> dict[str, float]:
        return {"num_groups": float(len(self.groups.unique()))}
