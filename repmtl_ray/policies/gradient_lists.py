"""Lists of gradients by parameter: sums, zeros where a parameter has none, and the last kernel.

Owns functions of lists of tensors. Knows neither tasks nor workers.
"""

from __future__ import annotations

from collections.abc import Sequence

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
