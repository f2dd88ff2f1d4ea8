"""A `transformers.Trainer` whose loss is the policy's; what an evaluation reports is the losses' sum."""

from __future__ import annotations

import torch
from plain import Network, batches, losses_of
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from repmtl_ray import RepMTL, combined_loss, policies


class Rows(Dataset):
    def __init__(self, steps: int) -> None:
        pairs = [torch.cat(parts) for parts in zip(*batches(steps), strict=True)]
        self.rows = [{"inputs": one, "labels": two} for one, two in zip(*pairs, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class MultiTaskTrainer(Trainer):
    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.policy, self.rep_mtl = policies.build("FairGrad", num_tasks=2), RepMTL(share=0.1)
        self.totals: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_):
        features, predictions = model(inputs["inputs"])
        losses = losses_of(predictions, inputs["labels"])
        if not model.training:
            return (sum(losses), (features, *predictions)) if return_outputs else sum(losses)
        self.totals.append(sum(loss.item() for loss in losses))
        shared = list(self.accelerator.unwrap_model(model).encoder.parameters())
        penalty = self.rep_mtl(losses, features)
        return combined_loss(self.policy, losses, shared) + penalty


def train(folder: str, steps: int = 40) -> tuple[Network, list[float]]:
    torch.manual_seed(1)
    network = Network()
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=16, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    trainer = MultiTaskTrainer(
        network, arguments, train_dataset=Rows(steps), optimizers=(optimizer, None)
    )
    trainer.train()
    return network, trainer.totals
