"""Weights on the simplex when some tasks are absent: the present ones divide what they hold."""

from __future__ import annotations

import torch
from torch import Tensor


def among(shares: Tensor, tasks: Tensor) -> Tensor:
    """[P] shares of some tasks in what these hold together, summing to 1; equal if that is nothing.

    Args:
        shares: [T], summing to 1.
        tasks: [P] indices.
    """
    held = shares[tasks].sum()
    equal = torch.full_like(shares[tasks], 1 / len(tasks))
    return torch.where(held > 0, shares[tasks] / held, equal)


def spread_over(shares: Tensor, found: Tensor, tasks: Tensor) -> Tensor:
    """[T] shares after some tasks divided what they hold anew; the others keep theirs.

    Args:
        shares: [T], summing to 1.
        found: [P], summing to 1.
        tasks: [P] indices.
    """
    shares = shares.clone()
    shares[tasks] = found * shares[tasks].sum()
    return shares
