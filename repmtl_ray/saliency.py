"""Task saliency, equation 3: each task's loss differentiated at the shared representation.

Owns the derivative and its arrangement as [tasks, batch, channels, *positions]; the penalties on it
are in `regularizers.py`. No Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_saliency(losses: Sequence[Tensor], representation: Tensor) -> Tensor:
    """The gradient of every task's loss at the shared representation, itself differentiable.

    Args:
        losses: T scalars, one a task, each computed from `representation`; T >= 1. A list, not one
            stacked tensor.
        representation: [batch, ...], any shape; part of the losses' graph.

    Returns:
        [T, *representation.shape], dtype of `representation`; differentiable as often as the heads
        and losses are. The losses' graph is kept.

    Raises:
        ValueError: a stacked tensor, a loss that is not a scalar or does not depend on the
            representation, or a representation outside any graph.

    Source:
        Rep-MTL, arXiv:2507.21049, equation 3. The derivative passes through heads and losses only,
        never the encoder. A stacked tensor is refused because indexing it sends each task's
        derivative through every head: slower by T, and one task's infinity becomes another's NaN.
    """
    if isinstance(losses, Tensor):
        raise ValueError(
            f"losses is one tensor of shape {tuple(losses.shape)}; expected a list of scalar losses, one a task "
            "(indexing a stacked tensor differentiates every head for every task)."
        )
    if not representation.requires_grad:
        raise ValueError(
            "representation does not require grad; expected the tensor that the heads were computed from, with "
            "gradients enabled."
        )
    saliencies = []
    for index, loss in enumerate(losses):
        if loss.numel() != 1:
            raise ValueError(f"losses[{index}] has shape {tuple(loss.shape)}; expected a scalar.")
        saliency: Tensor | None = None
        if loss.requires_grad:
            (saliency,) = torch.autograd.grad(
                loss, representation, create_graph=True, allow_unused=True
            )
        if saliency is None:
            raise ValueError(
                f"losses[{index}] does not depend on the representation; compute it from this very tensor "
                "(not from a copy, a detached tensor or an earlier layer)."
            )
        saliencies.append(saliency)
    if not saliencies:
        raise ValueError("losses is empty; expected one scalar loss a task.")
    return torch.stack(saliencies)


def arrange(saliency: Tensor, channel_axis: int = 1) -> Tensor:
    """Moves the channels to where the penalties expect them.

    Args:
        saliency: [tasks, batch, ...] with one channel axis and any number of position axes.
        channel_axis: of the representation (batch is axis 0): 1 for feature maps and vectors, 2 or
            -1 for tokens.

    Returns:
        [tasks, batch, channels, *positions], a view.
    """
    axis = channel_axis if channel_axis < 0 else channel_axis + 1
    return saliency.movedim(axis, 2)
