"""What every policy refuses: losses and gradients that no update can be made from.

Owns the checks and their messages, which name policy, task and step. Owns no policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.conversion import NonFiniteGradientError, NonFiniteLossError

SMALLEST_LOSS = 1e-30
"""A policy that needs positive losses takes this for a smaller one, so that logarithms and ratios
are finite."""


def require_finite_gradients(
    policy: str, tasks: Sequence[str], step: int, is_finite: Tensor
) -> None:
    """Refuses task gradients that hold inf or nan.

    Args:
        policy, tasks: names, for the message.
        step: from 1.
        is_finite: [T] bool, on the CPU.

    Raises:
        NonFiniteLossError: names the policy, the tasks and the step.
    """
    if not bool(is_finite.all()):
        names = ", ".join(
            repr(task) for task, finite in zip(tasks, is_finite.tolist(), strict=True) if not finite
        )
        raise NonFiniteGradientError(
            f"policy {policy!r}: the gradient of task {names} is not finite at step {step}; lower "
            "the learning rate, or look at this task's predictions and labels."
        )


def require_losses(
    policy: str, tasks: Sequence[str], step: int, losses: Tensor, *, positive: bool
) -> None:
    """Refuses a loss that is inf or nan, or negative where it must not be.

    Args:
        policy: name, for the message.
        tasks: names, by loss.
        step: from 1.
        losses: one per task.
        positive: whether negative losses are refused too.

    Raises:
        NonFiniteLossError: names the policy, the task, the loss and the step.
    """
    allowed = losses.isfinite() & (losses >= 0) if positive else losses.isfinite()
    if not bool(allowed.all()):
        index = int(torch.nonzero(~allowed)[0])
        wanted = "a finite number >= 0" if positive else "a finite number"
        raise NonFiniteLossError(
            f"policy {policy!r}: the loss of task {tasks[index]!r} is {float(losses[index])} at "
            f"step {step}; expected {wanted}. Look at this task's predictions and labels."
        )


def require_step(
    policy: str, tasks: Sequence[str], gradients: Tensor, losses: Tensor, present: Tensor
) -> None:
    """Refuses what a training loop gives to `Policy.combine` if it is not one row or number per
    task.

    Raises:
        ValueError: names the policy, the tensor, its shape and the tasks.
    """
    expected = f"per task ({', '.join(tasks)})"
    if gradients.ndim != 2 or len(gradients) != len(tasks) or not gradients.is_floating_point():
        raise ValueError(
            f"policy {policy!r}: gradients have shape {tuple(gradients.shape)} and type "
            f"{gradients.dtype}; expected floating-point numbers [{len(tasks)}, size], one row "
            f"{expected}."
        )
    for name, values in {"losses": losses, "present": present}.items():
        if values.shape != (len(tasks),):
            raise ValueError(
                f"policy {policy!r}: the argument {name} has shape {tuple(values.shape)}; expected "
                f"({len(tasks)},), one number {expected}."
            )


def refuse_loss_with_logs(
    policy: str, argument: str, normalization: str, *, log_losses: bool
) -> None:
    """Refuses gradients of log L that are to be divided by L once more.

    Raises:
        ValueError: names the policy, the argument and what to take in its place.
    """
    if log_losses and normalization in ("loss", "loss+"):
        raise ValueError(
            f"policy.arguments.{argument} of policy {policy!r} is {normalization!r} with "
            "log_losses on: the gradient of log L is that of L divided by L already; take 'none' "
            "or 'l2', or turn log_losses off."
        )
