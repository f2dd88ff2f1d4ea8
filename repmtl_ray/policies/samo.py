"""SAMO: sharpness-aware multi-task optimisation with joint global and local perturbations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Fraction, Positive
from repmtl_ray.policies.perturbations import (
    gradients_at,
    norm_of,
    require_finite,
    scaled,
    zeros_like_all,
)
from repmtl_ray.policies.perturbed import PerturbedPolicy
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class SAMO(PerturbedPolicy):
    """A base policy combines task gradients at parameters that are perturbed towards a higher mean
    loss and, by a zeroth-order estimate, towards a higher loss of the task.

    With g the gradient of the mean loss and z_t a normal draw, tensor by tensor: v = share_global g
    + (1 - share_global) |g| s_t z_t / |z_t|, where s_t is the sign of L_t(+mu z_t) - L_t(-mu z_t);
    the perturbation is radius v / |v|, of all shared parameters together. Head t is perturbed by
    radius g_head / |g_head|, and follows the gradient there, weighed as the base weighs heads. A
    difference of losses that is exactly 0 leaves the global part alone.

    Args:
        radius: length of both perturbations.
        share_global: alpha; the code's beta is 1 - alpha.
        mu: half-width of the difference of losses.

    Source:
        Ban, Subramani and Ji, "SAMO: a lightweight sharpness-aware approach for multi-task
        optimization with joint global-local perturbation", ICCV 2025, arXiv:2507.07883; rule and
        defaults of its official code's run scripts (FairGrad as base, radius 0.001, beta 0.5; QM9:
        1e-5 and 0.9). The losses of the difference are taken in eval mode, as in the code. Not
        copied: NYUv2's raw differences, QM9's perturbation of heads without a radius, Office-Home's
        shared parameters that are not put back. Draws are by (seed, step); the code reseeds the
        global generator. State: the base's. Costs 1 + 3 T forward passes and 1 + T encoder
        backwards, and T gradients in memory.
    """

    radius: Positive = 1e-3
    share_global: Fraction = 0.5
    mu: Positive = 0.01

    name = "SAMO"

    def backward(self, task_pass: TaskPass) -> None:
        tasks = task_pass.present.nonzero().flatten().tolist()
        gradients = zeros_like_all(task_pass)
        if tasks:
            equal = task_pass.present.double() / len(tasks)
            mean = task_pass.direction(equal)
            parts = mean.split([parameter.numel() for parameter in task_pass.shared])
            heads = task_pass.global_head_gradients()
            for task in tasks:
                moves = self._moves(task_pass, task, parts)
                head_moves = scaled(heads[task], self.radius)
                shared, head = gradients_at(task_pass, task, moves, head_moves)
                gradients.shared[task], gradients.heads[task] = shared, head
        require_finite(self.name, self.step + 1, task_pass, gradients.shared)
        self._base.step = self.step
        self._base.backward(task_pass.with_gradients(gradients.shared, gradients.heads))
        self.last_weights = self._base.last_weights
        self.last_head_weights = self._base.last_head_weights
        self.step += 1

    def _moves(self, task_pass: TaskPass, task: int, mean: tuple[Tensor, ...]) -> list[Tensor]:
        """By shared parameter, a task's perturbation."""
        device = mean[0].device
        with self._drawing(device, self.tasks[task]):
            draws = [torch.randn_like(part) for part in mean]
        heads = [parameter for head in task_pass.head_parameters for parameter in head]
        still = [torch.zeros_like(parameter) for parameter in heads]
        up = task_pass.losses_at([*(self.mu * draw for draw in draws), *still])[task]
        down = task_pass.losses_at([*(-self.mu * draw for draw in draws), *still])[task]
        sign = float(torch.sign(up - down))
        share = self.share_global
        moves = []
        for part, draw in zip(mean, draws, strict=True):
            local = scaled([draw], sign * norm_of([part]))[0]
            moves.append(share * part + (1 - share) * local)
        return scaled(moves, self.radius)
