"""Parameters that move outside an optimiser: by a policy's own update, or for a second look.

Owns the two ways of moving and the way back. Knows no policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter


@torch.no_grad()
def apply_update(optimizer: torch.optim.Optimizer) -> None:
    """Subtracts the learning rate times what stands in `.grad`; weight decay as AdamW has it."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.mul_(1 - rate * group["weight_decay"]).add_(parameter.grad, alpha=-rate)


@contextlib.contextmanager
def moved(parameters: Sequence[Parameter], moves: Sequence[Tensor] | None) -> Iterator[None]:
    """Inside the block, parameters are where they were plus `moves`; then they are back, to the bit.

    Storage is swapped, so nothing is computed on the way back, and a graph that was built before the
    block is differentiated after it as if nothing had happened. Inside the block such a graph must
    not be differentiated.

    Args:
        parameters: of a model.
        moves: by parameter; None moves nothing.
    """
    before = [parameter.data for parameter in parameters]
    try:
        if moves is not None:
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.data = parameter.data + move.to(parameter.dtype).view_as(parameter)
        yield
    finally:
        for parameter, values in zip(parameters, before, strict=True):
            parameter.data = values


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode; then every module is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
