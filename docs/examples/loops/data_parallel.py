"""DistributedDataParallel of your own: two processes find what one finds with the whole batch.

Start it with torchrun --nproc-per-node=2, or call `train` in every process of a group. Losses are means
over the global batch, and DDP takes the mean of gradients where their sum is right: hence the factor.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from plain import Network, batches
from torch.nn.parallel import DistributedDataParallel

from repmtl_ray import RepMTL, combined_loss, policies
from repmtl_ray.collectives import current


def train(steps: int = 10) -> tuple[Network, list[float]]:
    torch.manual_seed(1)
    workers, network, totals = current(), Network(), []
    model = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    policy, rep_mtl = policies.build("FairGrad", num_tasks=2), RepMTL(workers=workers, share=0.1)
    shared = list(network.encoder.parameters())
    for inputs, targets in batches(steps):
        inputs = inputs.chunk(workers.size)[workers.rank]  # this process's rows
        targets = targets.chunk(workers.size)[workers.rank]
        features, predictions = model(inputs)
        losses = []
        for prediction, target in zip(predictions, targets.split(1, dim=1), strict=True):
            loss_sum = (prediction - target).square().sum()
            count = torch.tensor(float(len(target)))
            losses.append(workers.total(loss_sum) / workers.total(count))
        penalty = rep_mtl(losses, features)
        optimizer.zero_grad()
        loss = combined_loss(policy, losses, shared, workers=workers)
        (workers.size * (loss + penalty)).backward()
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    return network, totals


if __name__ == "__main__":
    dist.init_process_group("gloo")
    _, totals = train()
    print(f"{totals[0]:.2f} -> {totals[-1]:.2f}")
    dist.destroy_process_group()
