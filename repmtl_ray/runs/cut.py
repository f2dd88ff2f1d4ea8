"""Where the graph is cut in two, and the derivatives on either side of the cut.

Owns the cut at the representation, each task's derivative from its loss back to it, and the
encoder's backward pass. Knows nothing of penalties or workers, and of policies only what they may
ask of that pass. No Ray.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from repmtl_ray.policies.task_pass import EncoderBackward


@dataclass
class Cut:
    """Where the graph was cut: `root` ends the encoder's part, `leaf` (same values) begins the
    heads'."""

    root: Tensor
    leaf: Tensor

    def backward_to(self, before: Sequence[Parameter]) -> EncoderBackward:
        """The encoder's backward pass as a function of the cotangent at the cut; the graph is kept.

        Args:
            before: the parameters that `root` is computed with.

        Returns:
            As `EncoderBackward`; some of `before` may be named, and the pass ends at them.
        """
        root = self.root

        def backward(
            cotangent: Tensor, parameters: Sequence[Parameter] | None = None
        ) -> list[Tensor]:
            wanted = list(before if parameters is None else parameters)
            found = torch.autograd.grad(
                root, wanted, cotangent.to(root.dtype), retain_graph=True, allow_unused=True
            )
            return [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(wanted, found, strict=True)
            ]

        return backward


@contextlib.contextmanager
def cut_at(module: nn.Module) -> Iterator[Cut]:
    """Cuts the graph at a module's output for the forward passes inside.

    Raises:
        ValueError: the module's output is no tensor, or it did not run exactly once.
    """
    cuts: list[Cut] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"model.representation: {type(module).__name__} gives {type(output).__name__}; expected a tensor."
            )
        precise = output.dtype if output.dtype == torch.float64 else torch.float32
        cuts.append(Cut(output, output.detach().to(precise).requires_grad_()))
        return cuts[-1].leaf

    cut = Cut(torch.empty(0), torch.empty(0))
    handle = module.register_forward_hook(hook)
    try:
        yield cut
    finally:
        handle.remove()
    if len(cuts) != 1:
        raise ValueError(
            f"model.representation: {type(module).__name__} ran {len(cuts)} times in a forward pass; expected once."
        )
    cut.root, cut.leaf = cuts[0].root, cuts[0].leaf


@dataclass(frozen=True, kw_only=True)
class HeadSide:
    """The tasks' derivatives on the heads' side of the cut; own parts.

    Args:
        saliency: by task, [*leaf.shape].
        before: shared parameters that no loss reaches without passing the cut.
        after: the other shared parameters.
        after_gradients: by task, for `after`.
        head_gradients: by task, for its own head's parameters.
    """

    saliency: list[Tensor]
    before: list[Parameter]
    after: list[Parameter]
    after_gradients: list[list[Tensor | None]]
    head_gradients: list[list[Tensor | None]]


def differentiate(
    losses: Sequence[Tensor],
    leaf: Tensor,
    *,
    shared: Sequence[Parameter],
    may_be_after: bool,
    heads: Sequence[Sequence[Parameter]],
    create_graph: bool = False,
) -> HeadSide:
    """Differentiates every loss back to the cut, once; graphs are kept.

    Args:
        losses: scalars, by task.
        leaf: of the cut.
        shared: all shared parameters.
        may_be_after: whether some of them may lie behind the cut.
        heads: by task; its own parameters.
        create_graph: whether saliencies are to be differentiated again.
    """
    reachable = list(shared) if may_be_after else []
    gradients = [
        torch.autograd.grad(
            loss,
            [leaf, *reachable, *parameters],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        for loss, parameters in zip(losses, heads, strict=True)
    ]
    is_after = [any(parts[1 + i] is not None for parts in gradients) for i in range(len(reachable))]
    after = list(itertools.compress(reachable, is_after))
    after_ids = {id(parameter) for parameter in after}
    num_shared = 1 + len(reachable)
    return HeadSide(
        saliency=[torch.zeros_like(leaf) if parts[0] is None else parts[0] for parts in gradients],
        before=[parameter for parameter in shared if id(parameter) not in after_ids],
        after=after,
        after_gradients=[
            list(itertools.compress(parts[1:num_shared], is_after)) for parts in gradients
        ],
        head_gradients=[list(parts[num_shared:]) for parts in gradients],
    )


def detached(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The same values without a graph."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]
