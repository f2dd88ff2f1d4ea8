"""Communication between workers: sums, gathers and broadcasts that are differentiable to any order.

Owns the only calls of torch.distributed in the project. A worker holds two kinds of tensors.
**Replicated** ones are equal on every worker: parameters, the global losses, and everything that is
computed from those alone. **Own** ones belong to this worker's rows of the global batch. The
operations below turn tensors of one kind into the other, and their derivatives turn cotangents back:

    operation   from         to           its derivative
    total       own          replicated   spread
    spread      replicated   own          total
    gather      own rows     replicated   this worker's rows

A parameter is replicated but is used on own rows. Its gradient is therefore this worker's part of
the whole, and is totalled once, after the last backward pass. With one worker everything here is the
identity. All workers must make the same calls in the same order: no caller may branch on own data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return _Spread.apply(cotangents[0])


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return _Total.apply(cotangents[0])


@dataclass(frozen=True)
class Workers:
    """The workers of one run, as one of them sees them.

    Args:
        rank: this worker, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def total(self, own: Tensor) -> Tensor:
        """The sum over workers; replicated; any shape; differentiable to any order."""
        return own if self.size == 1 else _Total.apply(own)

    def spread(self, replicated: Tensor) -> Tensor:
        """The same values, for use with this worker's own rows; cotangents are summed over
        workers."""
        return replicated if self.size == 1 else _Spread.apply(replicated)

    def gather(self, own: Tensor) -> Tensor:
        """All workers' rows, concatenated in rank order along axis 0; every worker holds equally
        many.

        It is the total of rows that are padded with zeros, which is exact and differentiable to any
        order without further code. It is meant for small tensors (CSA's anchors), for which the
        padding costs little.
        """
        if self.size == 1:
            return own
        rows = own.shape[0]
        before = own.new_zeros(rows * self.rank, *own.shape[1:])
        after = own.new_zeros(rows * (self.size - 1 - self.rank), *own.shape[1:])
        return self.total(torch.cat([before, own, after]))

    @torch.no_grad()
    def total_(self, tensors: Iterable[Tensor]) -> None:
        """Sums each tensor over workers in place, in one message per dtype; no derivative."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(
                group, flat.split([tensor.numel() for tensor in group]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Gives every worker the first one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = Workers()


def current() -> Workers:
    """The workers of the default process group, or `ALONE` when torch.distributed was not
    started."""
    if dist.is_available() and dist.is_initialized():
        return Workers(rank=dist.get_rank(), size=dist.get_world_size())
    return ALONE
