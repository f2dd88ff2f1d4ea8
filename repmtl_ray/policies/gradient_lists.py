"""Lists of gradients by parameter: sums, zeros where a parameter has none, and the last kernel.

Owns functions of lists of tensors. Knows neither tasks nor workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def last_weight(parameters: Sequence[Parameter]) -> Parameter:
    """The last parameter with two axes at least; the last of all if there is none."""
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    return (weights or list(parameters))[-1]


def add_(
    into: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Tensor | None = None
) -> None:
    """Adds gradients, times a weight, to tensors in place; what is None counts as zero."""
    for target, gradient in zip(into, gradients, strict=True):
        if gradient is not None:
            target.add_(gradient if weight is None else gradient * weight.to(gradient.dtype))


def filled(gradients: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> list[Tensor]:
    """The gradients, with zeros where one is None."""
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def combined(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The weighted sum of tensors of one shape."""
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total.add_(tensor * weight.to(tensor.dtype))
    return total


def stacked(rows: Iterable[Sequence[Tensor]], num_rows: int) -> Tensor:
    """[num_rows, size]: each list of gradients as one row. Besides the whole, one row is in memory
    at a time."""
    matrix = torch.empty(0)
    for index, row in enumerate(rows):
        if index == 0:
            matrix = row[0].new_empty(num_rows, sum(part.numel() for part in row))
        torch.cat([part.reshape(-1) for part in row], out=matrix[index])
    return matrix


def blocks_of(parameters: Sequence[Parameter], num_blocks: int) -> list[list[Parameter]]:
    """The parameters in order, in at most so many blocks of about equally many elements."""
    blocks: list[list[Parameter]] = [[] for _ in range(num_blocks)]
    total, before = sum(parameter.numel() for parameter in parameters), 0
    for parameter in parameters:
        blocks[(before + parameter.numel() // 2) * num_blocks // total].append(parameter)
        before += parameter.numel()
    return [block for block in blocks if block]
