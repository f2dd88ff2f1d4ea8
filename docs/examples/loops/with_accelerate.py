"""Hugging Face Accelerate: the policy gives one loss, and Accelerate calls its backward pass."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from plain import Network, batches, losses_of

from repmtl_ray import RepMTL, combined_loss, policies


def train(steps: int = 40) -> tuple[Network, list[float]]:
    torch.manual_seed(1)
    accelerator, network, totals = Accelerator(cpu=True), Network(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    model, optimizer = accelerator.prepare(network, optimizer)
    policy, rep_mtl = policies.build("FairGrad", num_tasks=2), RepMTL(share=0.1)
    accelerator.register_for_checkpointing(policy)  # its state goes into save_state()
    shared = list(accelerator.unwrap_model(model).encoder.parameters())
    for inputs, targets in batches(steps):
        features, predictions = model(inputs.to(accelerator.device))
        losses = losses_of(predictions, targets.to(accelerator.device))
        penalty = rep_mtl(losses, features)
        optimizer.zero_grad()
        accelerator.backward(combined_loss(policy, losses, shared) + penalty)
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return network, totals


if __name__ == "__main__":
    _, totals = train()
    print(f"{totals[0]:.2f} -> {totals[-1]:.2f}")
