"""Gradient accumulation: the policy sees the gradients of the whole batch, once per optimiser step.

A policy is not linear, so combining every part's gradients alone is another method. The rows of the
task gradients are added up instead. Rep-MTL's penalty is a mean over samples and compares them, so
each part has its own: give parts of at least two samples.
"""

from __future__ import annotations

import torch
from plain import Network, batches, losses_of
from torch import Tensor, nn

from repmtl_ray import RepMTL, policies


def flat_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    parts = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


def train(num_parts: int = 4, steps: int = 40, penalty: float = 0.1) -> tuple[Network, list[float]]:
    torch.manual_seed(1)
    network, totals = Network(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    policy = policies.build("FairGrad", num_tasks=2)
    rep_mtl = RepMTL(share=penalty or None, through="encoder")
    shared = list(network.encoder.parameters())
    heads = [list(head.parameters()) for head in network.heads]
    for inputs, targets in batches(steps):
        rows: Tensor = torch.zeros(2, sum(p.numel() for p in shared))
        values = torch.zeros(2)
        optimizer.zero_grad()
        parts = zip(inputs.chunk(num_parts), targets.chunk(num_parts), strict=True)
        for part_inputs, part_targets in parts:
            features, predictions = network(part_inputs)
            losses = [loss / num_parts for loss in losses_of(predictions, part_targets)]
            rows += torch.stack([flat_gradients(loss, shared) for loss in losses])
            values += torch.stack(losses).detach()
            own = torch.autograd.grad(
                sum(losses), [p for head in heads for p in head], retain_graph=True
            )
            for parameter, gradient in zip((p for head in heads for p in head), own, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if penalty:
                rep_mtl(losses, features).backward(inputs=shared)
        combined = policy.combine(rows, values).split([p.numel() for p in shared])
        for parameter, gradient in zip(shared, combined, strict=True):
            at = gradient.view_as(parameter)
            parameter.grad = at if parameter.grad is None else parameter.grad + at
        for head, weight in zip(heads, policy.last_head_weights.tolist(), strict=True):
            for parameter in head:
                parameter.grad *= weight
        optimizer.step()
        totals.append(float(values.sum()))
    return network, totals


if __name__ == "__main__":
    print(train()[1])
