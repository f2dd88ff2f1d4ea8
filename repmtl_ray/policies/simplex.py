"""Shares of tasks, which sum to 1, where some tasks are absent: the present ones divide what they
have together."""

from __future__ import annotations

import torch
from torch import Tensor


def shares_among(shares: Tensor, tasks: Tensor) -> Tensor:
    """[P] shares of some tasks in what they have together; they sum to 1. They are equal if the
    tasks have nothing.

    Args:
        shares: [T], summing to 1.
        tasks: [P] indices.
    """
    total = shares[tasks].sum()
    equal = torch.full_like(shares[tasks], 1 / len(tasks))
    return torch.where(total > 0, shares[tasks] / total, equal)


def with_shares(shares: Tensor, new_shares: Tensor, tasks: Tensor) -> Tensor:
    """[T] shares after some tasks divided anew what they have together; the others keep theirs.

    Args:
        shares: [T], summing to 1.
        new_shares: [P], summing to 1.
        tasks: [P] indices.
    """
    shares = shares.clone()
    shares[tasks] = new_shares * shares[tasks].sum()
    return shares
