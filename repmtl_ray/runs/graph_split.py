"""The autograd graph, split in two at the representation, and the derivatives on either side.

Owns the split, each task's derivative from its loss back to it, and the encoder's backward pass.
Upstream is what the representation is computed with, downstream what is computed from it. Knows
nothing of penalties or workers, and of policies only what they may ask of the encoder's pass. No
Ray.
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

from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.policies.task_pass import EncoderBackward


@dataclass
class GraphSplit:
    """The two tensors with equal values at which the graph is split.

    Args:
        root: the end of the upstream graph.
        leaf: the beginning of the downstream graph; float32 at least.
    """

    root: Tensor
    leaf: Tensor

    def backward_to(
        self, upstream: Sequence[Parameter], encoder: nn.Module, *, scale: float = 1.0
    ) -> EncoderBackward:
        """The encoder's backward pass as a function of the cotangent at the split.

        The graph is kept, so the pass may be made any number of times.

        Args:
            upstream: the parameters that `root` is computed with.
            encoder: where they are. Activations that were not kept are computed again, which does
                not count in its running statistics.
            scale: the cotangent is multiplied by it, and the gradients are divided by it.

        Returns:
            As `EncoderBackward`; some of `upstream` may be named, and the pass ends at them.
        """
        root = self.root

        def backward(
            cotangent: Tensor, parameters: Sequence[Parameter] | None = None
        ) -> list[Tensor]:
            wanted = list(upstream if parameters is None else parameters)
            with frozen_statistics(encoder):
                scaled = cotangent if scale == 1 else cotangent * scale
                gradients = torch.autograd.grad(
                    root, wanted, scaled.to(root.dtype), retain_graph=True, allow_unused=True
                )
            return [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(wanted, unscaled(gradients, scale), strict=True)
            ]

        return backward


@contextlib.contextmanager
def split_graph_at(module: nn.Module) -> Iterator[GraphSplit]:
    """Splits the graph at a module's output for the forward pass inside.

    Yields:
        The split, whose tensors are set when the block ends.

    Raises:
        ValueError: the module's output is no tensor, or it did not run exactly once.
    """
    splits: list[GraphSplit] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"model.representation: {type(module).__name__} gives {type(output).__name__}; expected a tensor."
            )
        # What follows sees a new leaf with the same values, so a loss's derivative ends here and
        # the encoder is not differentiated once per task. Under autocast the leaf is float32:
        # saliency and penalties need the digits that half precision lacks.
        dtype = output.dtype if output.dtype == torch.float64 else torch.float32
        splits.append(GraphSplit(output, output.detach().to(dtype).requires_grad_()))
        return splits[-1].leaf

    split = GraphSplit(torch.empty(0), torch.empty(0))
    handle = module.register_forward_hook(hook)
    try:
        yield split
    finally:
        handle.remove()
    if len(splits) != 1:
        raise ValueError(
            f"model.representation: {type(module).__name__} ran {len(splits)} times in a forward pass; expected once."
        )
    split.root, split.leaf = splits[0].root, splits[0].leaf


@dataclass(frozen=True, kw_only=True)
class TaskDerivatives:
    """The tasks' derivatives downstream of the split; own parts.

    Args:
        saliency: by task, [*leaf.shape].
        upstream_parameters: shared parameters that no loss reaches without passing the split.
        downstream_parameters: the other shared parameters.
        downstream_gradients: by task, for `downstream_parameters`.
        head_gradients: by task, for its own head's parameters.
    """

    saliency: list[Tensor]
    upstream_parameters: list[Parameter]
    downstream_parameters: list[Parameter]
    downstream_gradients: list[list[Tensor | None]]
    head_gradients: list[list[Tensor | None]]


def differentiate_tasks(
    losses: Sequence[Tensor],
    leaf: Tensor,
    *,
    shared: Sequence[Parameter],
    may_be_downstream: bool,
    heads: Sequence[Sequence[Parameter]],
    create_graph: bool = False,
    scale: float = 1.0,
) -> TaskDerivatives:
    """Differentiates every loss back to the split, once; graphs are kept.

    Args:
        losses: scalars, by task.
        leaf: of the split.
        shared: all shared parameters.
        may_be_downstream: whether some of them may lie downstream.
        heads: by task; its own parameters.
        create_graph: whether the derivatives are to be differentiated again.
        scale: losses are multiplied by it, and the derivatives are divided by it.
    """
    # Which shared parameters lie downstream is not asked of the network's structure: it is those
    # that a loss has a gradient for although its graph ends at the leaf.
    candidates = list(shared) if may_be_downstream else []
    gradients = [
        unscaled(
            torch.autograd.grad(
                loss if scale == 1 else loss * scale,
                [leaf, *candidates, *parameters],
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,
            ),
            scale,
        )
        for loss, parameters in zip(losses, heads, strict=True)
    ]
    num_shared = 1 + len(candidates)
    is_downstream = [
        any(of_task[index] is not None for of_task in gradients) for index in range(1, num_shared)
    ]
    downstream = list(itertools.compress(candidates, is_downstream))
    downstream_ids = {id(parameter) for parameter in downstream}
    return TaskDerivatives(
        saliency=[
            torch.zeros_like(leaf) if of_task[0] is None else of_task[0] for of_task in gradients
        ],
        upstream_parameters=[
            parameter for parameter in shared if id(parameter) not in downstream_ids
        ],
        downstream_parameters=downstream,
        downstream_gradients=[
            list(itertools.compress(of_task[1:num_shared], is_downstream)) for of_task in gradients
        ],
        head_gradients=[list(of_task[num_shared:]) for of_task in gradients],
    )


def differentiate_saliency(
    saliency: Tensor, direction: Tensor, parameters: Sequence[Parameter], *, scale: float = 1.0
) -> Sequence[Tensor | None]:
    """The derivative of <saliency, direction> by parameters, which keeps the graph; None where it
    does not depend.

    Args:
        saliency: of a task, made with `create_graph`.
        direction: of the same shape.
        parameters: of the task's head.
        scale: the direction is multiplied by it, and the derivative is divided by it.
    """
    if not saliency.requires_grad:  # a loss that is constant, or linear in the representation
        return [None] * len(parameters)
    scaled = direction if scale == 1 else direction * scale
    found = torch.autograd.grad(
        saliency, list(parameters), scaled, retain_graph=True, allow_unused=True
    )
    return unscaled(found, scale)


def unscaled(gradients: Sequence[Tensor | None], scale: float) -> Sequence[Tensor | None]:
    """The gradients divided by a scale; the same tensors if it is 1."""
    if scale == 1:
        return gradients
    return [None if gradient is None else gradient / scale for gradient in gradients]


def detached(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The same values without a graph."""
    return [None if tensor is None else tensor.detach() for tensor in tensors]
