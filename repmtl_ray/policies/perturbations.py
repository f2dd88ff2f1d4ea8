"""Task gradients where parameters are moved, and the lengths of moves.

Owns functions that SAMO and F-MTL share. Owns no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.gradient_lists import filled
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Task gradients, own parts: by task, by parameter."""

    shared: list[list[Tensor]]
    heads: list[list[Tensor | None]]


def zeros_like_all(task_pass: TaskPass) -> Gradients:
    """No gradient of any task."""
    return Gradients(
        shared=[[torch.zeros_like(p) for p in task_pass.shared] for _ in task_pass.tasks],
        heads=[[torch.zeros_like(p) for p in head] for head in task_pass.head_parameters],
    )


def gradients_at(
    task_pass: TaskPass, task: int, shared_moves: Sequence[Tensor], head_moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """A task's gradient, own parts, at the shared parameters and its head, where the shared
    parameters and this task's head are moved.

    Args:
        task_pass: of the step.
        task: index.
        shared_moves: by shared parameter, replicated.
        head_moves: by parameter of the task's head, replicated.
    """
    moves = [*shared_moves]
    for other, parameters in enumerate(task_pass.head_parameters):
        moves += head_moves if other == task else [torch.zeros_like(p) for p in parameters]
    with task_pass.look(moves) as there:
        # The other tasks' gradients are not wanted, so the encoder is differentiated once.
        after = filled(there.downstream_gradients[task], there.downstream_parameters)
        shared = [*there.encoder_backward(there.saliency[task]), *after]
        return shared, list(there.head_gradients[task])


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The norm of all entries together, in float64."""
    return float(torch.nn.utils.get_total_norm([tensor.double() for tensor in tensors]))


def scaled(tensors: Sequence[Tensor], length: float) -> list[Tensor]:
    """The tensors in the same proportions, with this norm together; zeros stay zero."""
    norm = norm_of(tensors)
    factor = length / norm if norm > 0 else 0.0
    return [tensor * factor for tensor in tensors]


def totalled(task_pass: TaskPass, own: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Copies of own parts by task and parameter, totalled over workers."""
    totals = [[tensor.clone() for tensor in row] for row in own]
    task_pass.workers.total_(tensor for row in totals for tensor in row)
    return totals


def require_finite(
    policy: str, step: int, task_pass: TaskPass, shared: Sequence[Sequence[Tensor]]
) -> None:
    """Refuses task gradients that hold inf or nan on any worker.

    Args:
        policy: name, for the message.
        step: from 1.
        task_pass: of the step.
        shared: by task, by shared parameter, own parts.

    Raises:
        NonFiniteLossError: names the policy, the tasks and the step.
    """
    own = [all(bool(part.isfinite().all()) for part in row) for row in shared]
    problems = torch.tensor([not is_finite for is_finite in own], dtype=torch.float64)
    problems = problems.to(task_pass.representation.device)
    task_pass.workers.total_([problems])
    require_finite_gradients(policy, task_pass.tasks, step, (problems == 0).cpu())
