"""A policy for training loops that call `backward` themselves: one scalar whose gradient is the update.

Owns this scalar. Wrappers that know one loss and one backward pass (Lightning's automatic
optimisation, `transformers.Trainer`, DistributedDataParallel, GradScaler) need nothing else of a
policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.policies.base import Policy


def combined_loss(
    policy: Policy,
    losses: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    workers: Workers = ALONE,
    log_losses: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """A scalar whose gradient is what the policy makes of the losses; counts one step of the policy.

    Its gradient at the shared parameters is the policy's combined gradient. At other parameters (of
    heads) it is that of the losses, each times the policy's weight for heads. Its value is the sum
    of the losses with these weights. It costs one backward pass for each task, besides the caller's
    own. `RepMTL`'s penalty may be added to it.

    Args:
        policy: from `policies.build`.
        losses: T scalars in the graph, in the policy's order.
        shared: the parameters that tasks share and that require grad.
        workers: of a data-parallel loop whose losses are means over the global batch, as for
            `RepMTL`: the scalar's gradient is this worker's part, and the parts' sum is right.
        log_losses: whether to train on the logarithms of the losses.
        scale: losses are differentiated times this, and gradients divided by it, which keeps
            gradients in half precision from vanishing (`GradScaler.get_scale()`).

    Raises:
        NonFiniteLossError: a loss or a gradient that is not finite.
        ValueError: as `Policy.combine`.

    Example:
        >>> combined_loss(policy, losses, list(encoder.parameters())).backward()
    """
    trained = [loss.log() if log_losses else loss for loss in losses]
    own = torch.stack([_row(loss * scale, shared) for loss in trained]) / scale
    rows = own.clone()
    workers.total_([rows])
    plain = torch.stack([loss.detach() for loss in losses])
    combined = policy.combine(rows, plain, log_losses=log_losses)
    assert policy.last_head_weights is not None
    weights = policy.last_head_weights.to(own)
    # The losses bring their own gradients to the shared parameters; the rest is a linear function.
    rest = (combined - weights @ rows) / workers.size
    parts = rest.split([parameter.numel() for parameter in shared])
    total = torch.stack(trained) @ weights.to(trained[0])
    for parameter, part in zip(shared, parts, strict=True):
        product = (parameter * part.view_as(parameter)).sum()
        total = total + (product - product.detach())
    return total


def _row(loss: Tensor, shared: Sequence[Tensor]) -> Tensor:
    """The gradient of a loss at all shared parameters; zero where it does not depend on one."""
    parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if part is None else part).flatten()
            for part, parameter in zip(parts, shared, strict=True)
        ]
    )
