"""Rep-MTL's penalty in a step: from the tasks' saliencies to its gradient downstream of the split.

Owns the second derivative of heads and losses, the directions that studies put in its place, and
what is reported of both. What becomes of it at the encoder is the policy's
pass (`policies/task_pass.py`). No Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.collectives import Workers
from repmtl_ray.diagnostics import diagnose
from repmtl_ray.penalties import divergence_loss, scale_for_share
from repmtl_ray.policies.task_pass import Penalty
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.graph_split import unscaled


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a study puts in the place of the penalty's gradient, to see what its direction is worth.

    Args:
        direction: "flipped" is its opposite; "random" is drawn; "divergence" is that of another
            penalty, `divergence_loss`.
        draw_seed: of the draws; equal on all workers.
        rows: of each task in the batch.
        workers: all whose rows together are the global batch.
    """

    direction: Literal["random", "flipped", "divergence"]
    draw_seed: int
    rows: Sequence[slice]
    workers: Workers

    def draw(self, gradient: Tensor) -> Tensor:
        """Normal draws of the norm of `gradient`, own rows; every sample of the global batch has
        its own, whichever worker holds it."""
        generator = torch.Generator().manual_seed(self.draw_seed)
        noise = torch.zeros_like(gradient)
        for rows in dict.fromkeys((of_task.start, of_task.stop) for of_task in self.rows):
            num_own, first = rows[1] - rows[0], (rows[1] - rows[0]) * self.workers.rank
            shape = (num_own * self.workers.size, *gradient.shape[1:])
            drawn = torch.randn(shape, generator=generator)[first : first + num_own]
            noise[rows[0] : rows[1]] = drawn.to(noise)
        return noise * scale_for_share(1.0, [gradient], [noise], workers=self.workers)


def differentiate_penalty(
    regularizer: RepMTL,
    saliency: Tensor,
    leaf: Tensor,
    *,
    downstream: Sequence[Parameter],
    heads: Sequence[Sequence[Parameter]],
    keep_graph: bool,
    control: Control | None = None,
    scale: float = 1.0,
) -> tuple[Penalty, dict[str, Tensor]]:
    """The penalty's gradient down to the split, own parts, and its weighted terms (detached).

    Args:
        regularizer: which penalties, how strong, and whether behind the split (`through`).
        saliency: [tasks, batch, channels, *positions], in the graph of `leaf`.
        leaf: of the split.
        downstream: shared parameters behind the split.
        heads: by task; its own parameters.
        keep_graph: whether the graph is differentiated again later.
        control: another direction in place of the gradient's; None leaves it as it is.
        scale: the penalty is multiplied by it, and its gradient is divided by it.
    """
    terms = regularizer.terms(saliency)
    objective = torch.stack(list(terms.values())).sum()
    if control is not None and control.direction == "divergence":
        objective = divergence_loss(saliency, workers=control.workers)
    behind: list[Parameter] = []
    if regularizer.through == "all":
        behind = [*downstream, *(parameter for head in heads for parameter in head)]
    at_leaf, *found = unscaled(
        torch.autograd.grad(
            objective if scale == 1 else objective * scale,
            [leaf, *behind],
            allow_unused=True,
            retain_graph=keep_graph,
        ),
        scale,
    )
    gradients: list[Tensor | None] = list(found)
    if regularizer.through == "encoder":  # what lies behind the split follows its tasks alone
        gradients = [None] * (len(downstream) + sum(len(head) for head in heads))
    at_leaf = torch.zeros_like(leaf) if at_leaf is None else at_leaf
    if control is not None and control.direction == "random":
        at_leaf = control.draw(at_leaf)
    elif control is not None and control.direction == "flipped":
        at_leaf, gradients = -at_leaf, [None if g is None else -g for g in gradients]
    remaining: Sequence[Tensor | None] = gradients[len(downstream) :]
    by_head: list[Sequence[Tensor | None]] = []
    for parameters in heads:
        by_head.append(remaining[: len(parameters)])
        remaining = remaining[len(parameters) :]
    penalty = Penalty(
        representation=at_leaf,
        downstream=gradients[: len(downstream)],
        heads=by_head,
        share=regularizer.share,
    )
    return penalty, {name: term.detach() for name, term in terms.items()}


def diagnosed(
    aligned: Tensor,
    saliency: Sequence[Tensor],
    penalty: Penalty | None,
    *,
    tasks: Sequence[str],
    workers: Workers,
) -> dict[str, Tensor]:
    """The quantities of `diagnose`, on the device.

    Args:
        aligned: [tasks, batch, channels, *positions], with sample b of every task in row b.
        saliency: by task, as they reach the split.
        penalty: None when it is off.
        tasks: names.
        workers: whose rows together are the global batch.
    """
    return diagnose(
        aligned.detach(),
        tasks,
        task_gradient=torch.stack([of_task.detach() for of_task in saliency]).sum(dim=0),
        penalty_gradient=None if penalty is None else penalty.representation,
        workers=workers,
    )
