"""What every policy refuses: losses and gradients that no update can be made from.

Owns the checks and their messages: policy, task and step are named. Owns no policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.conversion import NonFiniteLossError

SMALLEST_LOSS = 1e-30
"""A positive-loss policy takes a smaller loss for this one: logarithms and ratios stay finite."""


def refuse_non_finite(policy: str, tasks: Sequence[str], step: int, finite: Tensor) -> None:
    """Raises if a task's gradient holds inf or nan.

    Args:
        policy, tasks: names, for the message.
        step: from 1.
        finite: [T] bool, on the CPU.

    Raises:
        NonFiniteLossError: names the policy, the tasks and the step.
    """
    if not bool(finite.all()):
        names = ", ".join(
            repr(task) for task, fine in zip(tasks, finite.tolist(), strict=True) if not fine
        )
        raise NonFiniteLossError(
            f"policy {policy!r}: the gradient of task {names} is not finite at step {step}; lower "
            "the learning rate, or look at this task's predictions and labels."
        )


def refuse_losses(
    policy: str, tasks: Sequence[str], step: int, losses: Tensor, present: Tensor, *, positive: bool
) -> None:
    """Raises if the loss of a present task is inf or nan, or negative where it must not be.

    Args:
        policy, tasks: names, for the message.
        step: from 1.
        losses: [T].
        present: [P] indices.
        positive: whether negative losses are refused too.

    Raises:
        NonFiniteLossError: names the policy, the task, the loss and the step.
    """
    for task in present.tolist():
        loss = float(losses[task])
        if not torch.isfinite(losses[task]) or (positive and loss < 0):
            wanted = "a finite number >= 0" if positive else "a finite number"
            raise NonFiniteLossError(
                f"policy {policy!r}: the loss of task {tasks[task]!r} is {loss} at step {step}; "
                f"expected {wanted}. Look at this task's predictions and labels."
            )


def positive_losses(
    policy: str, tasks: Sequence[str], step: int, losses: Tensor, present: Tensor
) -> Tensor:
    """[T] losses in float64 on the CPU, none below `SMALLEST_LOSS`; refused as by `refuse_losses`.

    Args:
        policy, tasks, step, losses, present: as there.
    """
    values = losses.detach().to("cpu", torch.float64)
    refuse_losses(policy, tasks, step, values, present, positive=True)
    return values.clamp(min=SMALLEST_LOSS)
