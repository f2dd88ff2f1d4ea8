"""Plain PyTorch: FairGrad combines task gradients, Rep-MTL's penalty is added. Prints first and last losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repmtl_ray import RepMTL, combined_loss, policies


class Network(nn.Module):
    """What all examples of this folder train: a shared encoder, one head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.encoder(inputs)
        return features, [head(features) for head in self.heads]


def batches(count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Two regressions of the same eight numbers, with different scales."""
    torch.manual_seed(0)
    truth = torch.randn(8, 2) * torch.tensor([1.0, 2.0])
    inputs = torch.randn(count, size, 8)
    return [(rows, torch.tanh(rows) @ truth) for rows in inputs]


def losses_of(predictions: list[Tensor], targets: Tensor) -> list[Tensor]:
    columns = targets.split(1, dim=1)
    return [nn.functional.mse_loss(p, t) for p, t in zip(predictions, columns, strict=True)]


def train(name: str = "FairGrad", steps: int = 40) -> tuple[Network, list[float]]:
    """The trained network, and the sum of the losses at every step."""
    torch.manual_seed(1)
    network, totals = Network(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    policy, rep_mtl = policies.build(name, num_tasks=2), RepMTL(share=0.1)
    shared = list(network.encoder.parameters())
    for inputs, targets in batches(steps):
        features, predictions = network(inputs)
        losses = losses_of(predictions, targets)
        penalty = rep_mtl(losses, features)
        optimizer.zero_grad()
        (combined_loss(policy, losses, shared) + penalty).backward()
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return network, totals


if __name__ == "__main__":
    _, totals = train()
    print(f"{totals[0]:.2f} -> {totals[-1]:.2f}")
