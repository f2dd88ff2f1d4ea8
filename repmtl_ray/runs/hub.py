"""A trained model as a folder of the Hugging Face Hub: weights, configuration and a model card.

Owns the class with `save_pretrained`, `from_pretrained` and `push_to_hub`, which are huggingface_hub's,
and the text of the card, which is of the run's record. No Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

import repmtl_ray
from repmtl_ray.config import Experiment, digest, from_dict, to_dict
from repmtl_ray.data.description import DataDescription
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.checkpoint_manager import read_marker

CARD = """---
library_name: repmtl_ray
tags: [multi-task-learning, rep-mtl]
---
# {tasks} by one network

A network of [timm](https://github.com/huggingface/pytorch-image-models)'s `{encoder}` and one head for
each of {num_tasks} tasks, trained by repmtl_ray {version} on {data} with policy {policy}.

| metric after epoch {epoch} | value |
|---|---|
{rows}

Images are [N, 3, {height}, {width}] floats in 0..1, minus {mean}, divided by {deviation}.

```python
from repmtl_ray.runs.hub import HubModel

model = HubModel.from_pretrained("FOLDER or NAME/REPOSITORY")
predictions = model(images)  # by task
```

Experiment {digest}; config.json has all of it.
"""


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="repmtl_ray"):
    """A trained model that a folder or a repository of the Hub can hold.

    Args:
        experiment: of its run, as plain values.
        data: description of the data, as plain values.
        metrics: of the epoch that the weights are of.

    Attributes:
        network: the model, in eval mode.
    """

    def __init__(
        self,
        experiment: dict[str, Any],
        data: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.experiment = from_dict(Experiment, experiment)
        self.data = from_dict(DataDescription, data)
        self.metrics = dict(metrics or {})
        self.network = checkpoint.build_stored_model(self.experiment, self.data).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Every task's prediction for normalised images [rows, 3, H, W]."""
        return self.network(images)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, from the record of the run."""
        return ModelCard(card_text(self.experiment, self.data, self.metrics))


def hub_model(directory: str | Path) -> HubModel:
    """The model of a checkpoint, with its last epoch's metrics.

    Raises:
        ValueError: no whole checkpoint of this version.
    """
    experiment, data = checkpoint.read_experiment(directory), checkpoint.read_description(directory)
    history = read_marker(str(directory)).history
    model = HubModel(to_dict(experiment), to_dict(data), history[-1] if history else None)
    model.network.load_state_dict(checkpoint.read_model(directory).state_dict())
    return model


def card_text(experiment: Experiment, data: DataDescription, metrics: Mapping[str, float]) -> str:
    """The model card as Markdown."""
    shown = {name: value for name, value in metrics.items() if name.split("/")[0] in _names(data)}
    policy = experiment.policy
    losses = "log losses" if policy.log_losses else "plain losses"
    penalties = experiment.regularizer
    return CARD.format(
        tasks=" and ".join(_names(data)).capitalize(),
        encoder=experiment.model.encoder,
        num_tasks=len(data.tasks),
        version=repmtl_ray.__version__,
        data=experiment.data.name,
        policy=f"{policy.name} on {losses}, lambda_tsr {penalties.lambda_tsr:g}, lambda_csa {penalties.lambda_csa:g}",
        epoch=int(metrics.get("epoch", 0)),
        rows="\n".join(f"| {name} | {value:.4f} |" for name, value in shown.items()),
        height=data.size_of_images[0],
        width=data.size_of_images[1],
        mean=list(data.mean or (0, 0, 0)),
        deviation=list(data.deviation or (1, 1, 1)),
        digest=digest(experiment),
    )


def _names(data: DataDescription) -> list[str]:
    return [task.name for task in data.tasks]
