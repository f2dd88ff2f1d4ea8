"""Lightning: automatic optimisation gets one loss from the policy; manual one is the plain loop."""

from __future__ import annotations

import lightning
import torch
from plain import Network, batches, losses_of
from torch import Tensor
from torch.utils.data import DataLoader

from repmtl_ray import RepMTL, combined_loss, policies


class Automatic(lightning.LightningModule):
    """`training_step` returns a scalar whose gradient is the policy's update."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network, self.totals = Network(), []
        self.policy, self.rep_mtl = policies.build("FairGrad", num_tasks=2), RepMTL(share=0.1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        features, predictions = self.network(inputs)
        losses = losses_of(predictions, targets)
        self.totals.append(sum(loss.item() for loss in losses))
        penalty = self.rep_mtl(losses, features)
        return combined_loss(self.policy, losses, list(self.network.encoder.parameters())) + penalty

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor | None:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=0.03)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["policy"] = self.policy.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.policy.load_state_dict(checkpoint["policy"])


class Manual(Automatic):
    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def train(kind: type[Automatic] = Automatic, steps: int = 40) -> tuple[Network, list[float]]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = False
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    module = kind()
    trainer.fit(module, DataLoader(batches(steps), batch_size=None))
    return module.network, module.totals
