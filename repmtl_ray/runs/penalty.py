"""Rep-MTL's penalty in a step: from the tasks' saliencies to its gradient downstream of the split.

Owns the second derivative of heads and losses. What becomes of it at the encoder is the policy's
pass (`policies/task_pass.py`). No Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.policies.task_pass import Penalty
from repmtl_ray.rep_mtl import RepMTL


def differentiate_penalty(
    regularizer: RepMTL,
    saliency: Tensor,
    leaf: Tensor,
    *,
    downstream: Sequence[Parameter],
    heads: Sequence[Sequence[Parameter]],
    keep_graph: bool,
) -> tuple[Penalty, dict[str, Tensor]]:
    """The penalty's gradient down to the split, own parts, and its weighted terms (detached).

    Args:
        regularizer: which penalties, how strong, and whether behind the split (`through`).
        saliency: [tasks, batch, channels, *positions], in the graph of `leaf`.
        leaf: of the split.
        downstream: shared parameters behind the split.
        heads: by task; its own parameters.
        keep_graph: whether the graph is differentiated again later.
    """
    terms = regularizer.terms(saliency)
    behind: list[Parameter] = []
    if regularizer.through == "all":
        behind = [*downstream, *(parameter for head in heads for parameter in head)]
    at_leaf, *found = torch.autograd.grad(
        torch.stack(list(terms.values())).sum(),
        [leaf, *behind],
        allow_unused=True,
        retain_graph=keep_graph,
    )
    gradients: list[Tensor | None] = list(found)
    if regularizer.through == "encoder":  # what lies behind the split follows its tasks alone
        gradients = [None] * (len(downstream) + sum(len(head) for head in heads))
    remaining: Sequence[Tensor | None] = gradients[len(downstream) :]
    by_head: list[Sequence[Tensor | None]] = []
    for parameters in heads:
        by_head.append(remaining[: len(parameters)])
        remaining = remaining[len(parameters) :]
    penalty = Penalty(
        representation=torch.zeros_like(leaf) if at_leaf is None else at_leaf,
        downstream=gradients[: len(downstream)],
        heads=by_head,
        share=regularizer.share,
    )
    return penalty, {name: term.detach() for name, term in terms.items()}
