"""Half precision with GradScaler: task gradients are those of scaled losses, unscaled for the policy.

Rep-MTL differentiates heads twice, so they and their losses run in float32, outside of autocast; the
encoder, which is differentiated once, runs in half precision.
"""

from __future__ import annotations

import torch
from plain import Network, batches, losses_of

from repmtl_ray import NonFiniteLossError, RepMTL, combined_loss, policies


def train(
    device: str = "cpu", steps: int = 40, scale: float = 2.0**10
) -> tuple[Network, list[float]]:
    """The trained network and the sums of losses; a step that overflows is left out, as usual."""
    torch.manual_seed(1)
    network, totals = Network().to(device), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    one = torch.ones((), device=device)
    policy, rep_mtl = policies.build("FairGrad", num_tasks=2), RepMTL(share=0.1)
    shared = list(network.encoder.parameters())
    for inputs, targets in batches(steps):
        with torch.autocast(device, dtype=torch.float16):
            features = network.encoder(inputs.to(device))
        features = features.float()
        losses = losses_of([head(features) for head in network.heads], targets.to(device))
        optimizer.zero_grad()
        penalty = rep_mtl(losses, features)
        try:
            loss = combined_loss(policy, losses, shared, scale=float(scaler.scale(one)))
        except NonFiniteLossError:  # the scale was too large; the policy has made no step
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            continue
        scaler.scale(loss + penalty).backward()
        scaler.step(optimizer)
        scaler.update()
        totals.append(sum(loss.item() for loss in losses))
    return network, totals


if __name__ == "__main__":
    _, totals = train()
    print(f"{totals[0]:.2f} -> {totals[-1]:.2f}")
