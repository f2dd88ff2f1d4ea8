"""Task saliency, equation 3: each task's loss differentiated at the shared representation.

Owns the derivative, its errors, and its layout as [tasks, batch, channels, *positions]; the penalties
on it are in `penalties.py`. No Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Losses = Sequence[Tensor] | Mapping[str, Tensor]
"""One scalar loss per task, in order or by name."""

_CAUSES = {
    "inplace operation": "an operation in place (for example nn.ReLU(inplace=True)) overwrote a "
    "tensor that the derivative needs. Write `for m in model.modules(): m.inplace = False` before "
    "training",
    "attention": "fused attention has no second derivative. Run the heads inside `with "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`",
    "aot_autograd": "a compiled module has no second derivative. Do not compile what follows the "
    "representation: write `encoder = torch.compile(encoder)` and leave the heads as they are",
    "second time": "the losses' graph is freed already. Compute the penalty before the backward "
    "pass: `(sum(losses) + regularizer(losses, representation)).backward()`",
}
"""By a part of PyTorch's message: what the cause is, and what to do."""


def task_saliency(losses: Losses, representation: Tensor) -> Tensor:
    """The gradient of every task's loss at the shared representation, itself differentiable.

    Args:
        losses: T scalars, one per task, each computed from `representation`; T >= 1. A list or a
            mapping by task, not one stacked tensor.
        representation: [batch, ...], any shape; part of the losses' graph.

    Returns:
        [T, *representation.shape], dtype of `representation`; differentiable as often as the heads
        and losses are. The losses' graph is kept.

    Raises:
        ValueError: a stacked tensor, a loss that is not a scalar or does not depend on the
            representation, a representation outside any graph, gradients that are turned off, or an
            operation in between that cannot be differentiated.

    Source:
        Rep-MTL, arXiv:2507.21049, equation 3. The derivative passes through heads and losses only,
        never the encoder. A stacked tensor is refused because indexing it sends each task's
        derivative through every head: slower by T, and one task's infinity becomes another's NaN.
    """
    check_representation(representation)
    return named_saliency(named_losses(losses), representation)


def named_saliency(losses: Mapping[str, Tensor], representation: Tensor) -> Tensor:
    """As `task_saliency`, for losses by what messages call them and a checked representation."""
    saliencies = []
    for name, loss in losses.items():
        saliency: Tensor | None = None
        if loss.requires_grad:
            try:
                (saliency,) = torch.autograd.grad(
                    loss, representation, create_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                raise derivative_error(error) from error
        if saliency is None:
            raise ValueError(
                f"{name} does not depend on the representation; compute it from this very tensor (not from a copy, "
                "a detached tensor or an earlier layer). A head that changes the representation in place, for example by "
                "nn.ReLU(inplace=True), has the same effect: write `for m in model.modules(): m.inplace = False`."
            )
        saliencies.append(saliency)
    return torch.stack(saliencies)


def named_losses(losses: Losses) -> dict[str, Tensor]:
    """The losses by what messages call them: "losses['depth']" or "losses[0]".

    Raises:
        ValueError: no losses, a stacked tensor, or an entry that is not a scalar tensor.
    """
    if isinstance(losses, Tensor):
        raise ValueError(
            f"losses is one tensor of shape {tuple(losses.shape)}; expected a list of scalar losses, one per task "
            "(indexing a stacked tensor differentiates every head for every task)."
        )
    if isinstance(losses, str) or not isinstance(losses, Iterable):
        raise ValueError(
            f"losses is {losses!r}; expected a list of scalar losses, or a mapping by task."
        )
    pairs = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
    by_name = {f"losses[{key!r}]": loss for key, loss in pairs}
    for name, loss in by_name.items():
        if not isinstance(loss, Tensor):
            raise ValueError(f"{name} is {type(loss).__name__}; expected a scalar tensor.")
        if loss.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(loss.shape)}; expected a scalar.")
    if not by_name:
        raise ValueError("losses is empty; expected one scalar loss per task.")
    return by_name


def check_representation(representation: Tensor) -> None:
    """
    Raises:
        ValueError: several tensors, or a tensor that no loss can be differentiated at.
    """
    if not isinstance(representation, Tensor):
        size = f" of {len(representation)}" if isinstance(representation, (list, tuple)) else ""
        raise ValueError(
            f"representation is a {type(representation).__name__}{size}; expected one tensor: pass the one that the heads "
            "are computed from, for example `regularizer(losses, representation[-1])`."
        )
    if not torch.is_grad_enabled() or representation.is_inference():
        raise ValueError(
            "gradients are turned off (torch.no_grad or torch.inference_mode), but saliency is a derivative. Leave the "
            "penalty out of evaluation, or compute encoder, heads and penalty inside `with torch.enable_grad():`."
        )
    if not representation.requires_grad:
        raise ValueError(
            "representation does not require grad: its encoder is frozen, it was computed under torch.no_grad, or it "
            "is detached. Write `representation.requires_grad_()` before the heads are computed from it."
        )


def derivative_error(error: RuntimeError) -> ValueError:
    """PyTorch's error of a derivative, with its cause and the remedy."""
    reason = str(error).strip().split("\n")[0]
    for part, cause in _CAUSES.items():
        if part in reason:
            return ValueError(f"{cause} (PyTorch: {reason}).")
    return ValueError(
        "an operation between representation and losses cannot be differentiated twice, which Rep-MTL needs. Replace "
        f"the operation that PyTorch names, or take the representation after it (PyTorch: {reason})."
    )


def channels_first(saliency: Tensor, channel_axis: int = 1) -> Tensor:
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


def align_task_rows(saliency: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """The saliencies of all tasks in one tensor, with sample b of every task in row b.

    Args:
        saliency: T tensors [batch rows, ...]; a task's rows outside its own slice are zero.
        rows: by task, its slice of the batch rows. Equal slices (dense tasks): the rows stay as
            they are. Different slices (Office: every task has its own images): row b of every
            slice becomes sample b, as in the benchmarks that the paper builds on. Shorter slices
            are filled up with zeros, which both penalties leave out.

    Returns:
        [T, longest slice, ...].
    """
    first = rows[0]
    if all(of_task == first for of_task in rows) and first == slice(0, saliency[0].shape[0]):
        return torch.stack(list(saliency))
    longest = max(of_task.stop - of_task.start for of_task in rows)
    aligned = []
    for tensor, of_task in zip(saliency, rows, strict=True):
        own_rows = tensor[of_task]
        missing = own_rows.new_zeros(longest - own_rows.shape[0], *own_rows.shape[1:])
        aligned.append(torch.cat([own_rows, missing]))
    return torch.stack(aligned)
