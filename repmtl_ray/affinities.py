"""The anchors and affinities that CSA contrasts (equations 7 and 8), without C x C matrices.

Owns their values and derivatives for saliencies of any size: small ones at once, large ones a few
samples at a time. Knows nothing of workers. No Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

LARGEST_WHOLE = 2**22
"""Numbers of a saliency (16 MiB in float32) that CSA reads at once; of larger ones, it reads as many
samples at a time as have no more, and one at least."""
NUM_BLOCKS = 4
"""Of rows of a symmetric product: 10 of 16 blocks are computed, in products that are still large."""


class Affinities(NamedTuple):
    """What CSA and its diagnostics read of saliencies, by task and sample.

    Args:
        anchors: [batch, tasks, channels], equation 8 transposed, scaled to |A A^T| = 1; zero for a
            sample without saliency.
        has_anchor: [batch] bool.
        alignment: [tasks, batch], the cosine between the affinity S S^T (equation 7) and A A^T.
        has_affinity: [tasks, batch] bool, where S is not zero.
        squared_norm: [tasks, batch], |S S^T|^2 of S divided by its largest entry.
    """

    anchors: Tensor
    has_anchor: Tensor
    alignment: Tensor
    has_affinity: Tensor
    squared_norm: Tensor


def affinities(saliency: Tensor) -> Affinities:
    """The anchors, and how the affinities agree with them; differentiable to any order.

    Args:
        saliency: [tasks, batch, channels, N]. With more than `LARGEST_WHOLE` numbers, samples are
            taken a few at a time: equal to rounding, in less time, and with the memory of a few.
            A derivative that is itself differentiated takes all at once.
    """
    if saliency.numel() <= LARGEST_WHOLE:
        return _of(saliency, _gramian)[0]
    return Affinities(*_FewAtATime.apply(saliency))


def _of(saliency: Tensor, gramian_of: Callable[[Tensor], Tensor]) -> tuple[Affinities, Tensor]:
    """The affinities, and the matrices that `gramian_of` makes of the scaled saliency."""
    anchors, has_anchor = _unit_anchors(saliency)
    scaled, peak = _scaled(saliency)
    exists = (peak != 0).flatten(1)
    gramian = gramian_of(scaled)
    squared_norm = gramian.square().sum(dim=(2, 3))
    projection = (anchors @ scaled).square().sum(dim=(2, 3))  # <S S^T, A A^T> = |A^T S|^2
    alignment = projection / torch.where(exists, squared_norm, 1.0).sqrt()
    return Affinities(anchors, has_anchor, alignment, exists, squared_norm), gramian


def _gramian(saliency: Tensor) -> Tensor:
    """The smaller of S S^T and S^T S, whose norms are equal."""
    channels, positions = saliency.shape[2:]
    transposed = saliency.transpose(2, 3)
    return saliency @ transposed if channels < positions else transposed @ saliency


class _FewAtATime(Function):
    """`affinities`, whose passes hold a copy of a few samples and one matrix for each task and sample.

    The matrix G is symmetric: of the forward product some blocks are left out, and of the two
    products that autograd makes backward, S dG and S dG^T, one.
    """

    @staticmethod
    def forward(ctx: Any, saliency: Tensor) -> tuple[Tensor, ...]:
        ctx.num = max(1, saliency.shape[1] * LARGEST_WHOLE // saliency.numel())
        parts, gramians = [], []
        for own in saliency.split(ctx.num, dim=1):
            found, gramian = _of(own, gramian_by_blocks)
            parts.append(found)
            if ctx.needs_input_grad[0]:
                gramians.append(gramian)
        anchors, has_anchor, *by_task = zip(*parts, strict=True)
        result = torch.cat(anchors), torch.cat(has_anchor), *(torch.cat(p, dim=1) for p in by_task)
        ctx.save_for_backward(saliency, *gramians)
        ctx.mark_non_differentiable(result[1], result[3], result[4])
        return result

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        saliency, *gramians = ctx.saved_tensors
        of_anchors, _, of_alignment, *_ = cotangents
        with torch.autocast(saliency.device.type, enabled=False):
            if torch.is_grad_enabled():  # the derivative is to be differentiated
                whole, _ = _of(saliency, _gramian)
                outputs, given = (whole.anchors, whole.alignment), (of_anchors, of_alignment)
                return torch.autograd.grad(outputs, saliency, given, create_graph=True)[0]
            gradient = torch.empty_like(saliency)
            for part, *inputs in zip(
                gradient.split(ctx.num, dim=1),
                saliency.split(ctx.num, dim=1),
                gramians,
                of_anchors.split(ctx.num),
                of_alignment.split(ctx.num, dim=1),
                strict=True,
            ):
                part.copy_(_gradient_of_few(*inputs))
        return gradient


def _gradient_of_few(
    saliency: Tensor, gramian: Tensor, of_anchors: Tensor, of_alignment: Tensor
) -> Tensor:
    """The derivative of a few samples' anchors and alignments by [tasks, few, channels, N].

    With p = |A^T S|^2 and q = |G|^2, the alignment p / sqrt(q) has the derivative
    2 A A^T S / sqrt(q) - 2 p q^(-3/2) S G by S (G S, if G = S S^T), and 2 S S^T A / sqrt(q) by A.
    """
    channels, positions = saliency.shape[2:]
    with torch.enable_grad():
        means = saliency.detach().mean(dim=3, keepdim=True).requires_grad_()
        unit, _ = _unit_anchors(means)
    anchors = unit.detach()
    scaled, peak = _scaled(saliency)
    exists = peak != 0
    norm = torch.linalg.vector_norm(gramian, dim=(2, 3), keepdim=True)
    norm = torch.where(exists, norm, 1.0)
    projected = anchors @ scaled  # [tasks, few, tasks, N]
    factor = 2 * of_alignment[..., None, None] / norm
    of_gramian = gramian * (-factor * projected.square().sum((2, 3), keepdim=True) / norm.square())
    of_projected = factor * projected
    of_anchors = of_anchors + (of_projected @ scaled.transpose(2, 3)).sum(dim=0)
    (of_means,) = torch.autograd.grad(unit, means, of_anchors)
    # S was divided by its peak. The small factors are divided here in place of the large product.
    divisor = torch.where(exists, peak, 1.0)
    of_gramian, of_projected = of_gramian / divisor, of_projected / divisor
    product = of_gramian @ scaled if channels < positions else scaled @ of_gramian
    columns = anchors.transpose(1, 2).expand(len(saliency), -1, -1, -1)
    left = torch.cat([columns, of_means / positions], dim=3).flatten(0, 1)
    right = torch.cat([of_projected, torch.ones_like(of_projected[:, :, :1])], dim=2).flatten(0, 1)
    product.view(-1, channels, positions).baddbmm_(left, right)
    return product


def gramian_by_blocks(saliency: Tensor) -> Tensor:
    """The smaller of S S^T and S^T S of [tasks, few, channels, N], of which the blocks on and below
    the diagonal are computed."""
    channels, positions = saliency.shape[2:]
    rows = saliency if channels < positions else saliency.transpose(2, 3)
    size = rows.shape[2]
    gramian = saliency.new_empty(*saliency.shape[:2], size, size)
    height = -(-size // NUM_BLOCKS)
    for top in range(0, size, height):
        bottom = min(top + height, size)
        block = rows[:, :, top:bottom] @ rows[:, :, :bottom].transpose(2, 3)
        gramian[:, :, top:bottom, :bottom] = block
        gramian[:, :, :top, top:bottom] = block[..., :top].transpose(2, 3)
    return gramian


def _scaled(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """[tasks, batch, channels, N] with each matrix divided by its largest entry; and those, with
    two axes of size 1, without a graph."""
    entries = saliency.detach()
    largest, least = entries.amax((2, 3), keepdim=True), entries.amin((2, 3), keepdim=True)
    peak = torch.maximum(largest, -least)  # far faster than vector_norm of order infinity
    return saliency / torch.where(peak != 0, peak, 1.0), peak


def _unit_anchors(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """`Affinities.anchors` and `has_anchor` of [tasks, batch, channels, N]."""
    anchors = saliency.mean(dim=3).transpose(0, 1)
    peak = anchors.detach().abs().amax(dim=(1, 2), keepdim=True)
    exists = peak != 0
    anchors = anchors / torch.where(exists, peak, 1.0)
    # |A A^T| = |A^T A|, which is only [tasks, tasks]. The norm is of degree 2 in A, so A is divided
    # by its square root, the fourth root of the squared norm.
    squared_norm = (anchors @ anchors.transpose(1, 2)).square().sum(dim=(1, 2), keepdim=True)
    return anchors / torch.where(exists, squared_norm, 1.0).pow(0.25), exists.flatten()
