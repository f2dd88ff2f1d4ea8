"""F-MTL: flatness-aware multi-task learning, by task gradients where each task's loss is sharpest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.policies.arguments import Flag, Positive
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.perturbations import (
    Gradients,
    gradients_at,
    require_finite,
    scaled,
    totalled,
    zeros_like_all,
)
from repmtl_ray.policies.perturbed import PerturbedPolicy
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class FMTL(PerturbedPolicy):
    """The sum of what a base policy makes of the task gradients, and of what it makes of their
    change towards each task's sharpest direction.

    Task t's shared parameters are perturbed by radius g_t / |g_t|, its head by radius g_head /
    |g_head|, and S_t is the gradient there. The shared update is base(g_1, ..., g_T) + base(S_1 -
    g_1, ..., S_T - g_T), by two base policies with states of their own. Head t follows its gradient
    in S_t, weighed as the first base weighs heads.

    Args:
        radius: length of both perturbations.
        adaptive: perturb by radius p^2 g / | |p| g | in place of radius g / |g|, where p are the
            parameters.
        aggregate: "separately", as above; "together" combines the S_t alone, an ablation of the
            paper.

    Source:
        Phan et al., "Beyond losses reweighting: empowering multi-task learning via the
        generalization perspective", ICCV 2025, arXiv:2211.13723 (F-MTL, FS-MTL in its code); rule
        and defaults (radius 2, adaptive) of the official code. Batch norm: the statistics of the
        batch, running statistics of the first pass alone. The second base draws with another seed.
        State: both bases'. Costs 1 + T forward passes, 2 T encoder backwards and those of the
        bases, and 2 T gradients in memory.
    """

    radius: Positive = 2.0
    adaptive: Flag = True
    aggregate: Literal["separately", "together"] = "separately"

    name = "F-MTL"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._second = self._make_base(self.seed + 1)

    @property
    def _bases(self) -> dict[str, Policy]:
        second = {"second": self._second} if self.aggregate == "separately" else {}
        return {"base": self._base, **second}

    def backward(self, task_pass: TaskPass) -> None:
        here = task_pass.shared_gradients()
        require_finite(self.name, self.step + 1, task_pass, here)
        there = zeros_like_all(task_pass)
        heads = task_pass.global_head_gradients()
        for task in task_pass.present.nonzero().flatten().tolist():
            (total,) = totalled(task_pass, here[task : task + 1])
            moves = self._moves(task_pass.shared, total)
            head_moves = self._moves(task_pass.head_parameters[task], heads[task])
            there.shared[task], there.heads[task] = gradients_at(task_pass, task, moves, head_moves)
        require_finite(self.name, self.step + 1, task_pass, there.shared)
        for base in self._bases.values():
            base.step = self.step
        if self.aggregate == "together":
            self._base.backward(task_pass.with_gradients(there.shared, there.heads))
        else:
            self._combine_separately(task_pass, here, there)
        self.last_weights = self._base.last_weights
        self.last_head_weights = self._base.last_head_weights
        self.step += 1

    def _combine_separately(
        self, task_pass: TaskPass, here: list[list[Tensor]], there: Gradients
    ) -> None:
        changes = [
            [after - before for before, after in zip(*rows, strict=True)]
            for rows in zip(here, there.shared, strict=True)
        ]
        nothing = zeros_like_all(task_pass).heads
        self._second.backward(task_pass.with_gradients(changes, nothing, with_penalty=False))
        second = [parameter.grad for parameter in task_pass.shared]
        self._base.backward(task_pass.with_gradients(here, there.heads))
        for parameter, gradient in zip(task_pass.shared, second, strict=True):
            assert parameter.grad is not None
            assert gradient is not None
            parameter.grad += gradient

    def _moves(self, parameters: Sequence[Parameter], gradients: Sequence[Tensor]) -> list[Tensor]:
        """By parameter, the perturbation along its gradient."""
        if not self.adaptive:
            return scaled(gradients, self.radius)
        sizes = [parameter.detach().abs() for parameter in parameters]
        unit = scaled([s * g for s, g in zip(sizes, gradients, strict=True)], self.radius)
        return [size * move for size, move in zip(sizes, unit, strict=True)]
