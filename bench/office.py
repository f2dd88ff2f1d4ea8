"""A problem for `bench.methods`: photographs of three domains, behind pretrained stages that are not trained.

Photographs in the Office-31 layout (Amazon, DSLR, webcam), one task a domain. The first six of the seven
stages of an EfficientNet-Lite0 with ImageNet weights stay as they are: their outputs are computed once. All
methods train the same rest, the last stage and the last convolution, which the tasks share, and a linear
head for every domain. A run then takes seconds, where one that trains the whole encoder takes minutes.
The number of threads changes how these outputs round, so a command that is to go on needs the same one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from timm.models.efficientnet import EfficientNet
from torch import nn

from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.sources import open_streams, tasks_of
from repmtl_ray.data.stream import Sample, Stream
from repmtl_ray.models.encoders import build_encoder
from repmtl_ray.models.own import Model
from repmtl_ray.runs.build import Split
from repmtl_ray.tasks import Task

SIZE = 64
"""Height and width of the photographs, in pixels."""
ENCODER = ModelConfig(
    encoder="tf_efficientnet_lite0",
    weights="efficientnet_lite0",
    input_scale="symmetric",
    features="pooled",
    head="linear",
)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    model=ModelConfig(encoder="custom", code="bench.office"),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    epochs=3,
    batch_size=32,
)


def network() -> tuple[EfficientNet, int]:
    """The pretrained encoder, and the channels of its output."""
    encoder, num_channels = build_encoder(ENCODER, (SIZE, SIZE))
    assert isinstance(encoder, EfficientNet)
    return encoder, num_channels


class LastStage(nn.Module):
    """From the output of the sixth stage, [B, 192, 2, 2], to [B, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        encoder, self.num_channels = network()
        self.body = nn.Sequential(
            encoder.blocks[-1], encoder.conv_head, encoder.bn2, encoder.global_pool
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.body(features)
        return output


def make_model(tasks: tuple[Task, ...]) -> Model:
    """The last stage, with a linear head for every domain."""
    encoder = LastStage()
    heads = {task.name: nn.Linear(encoder.num_channels, task.num_outputs) for task in tasks}
    return Model(encoder=encoder, heads=heads)


@torch.no_grad()
def features_of(images: list[np.ndarray]) -> np.ndarray:
    """The output of the sixth stage, [N, 192, 2, 2] float32, for N photographs, [SIZE, SIZE, 3] uint8."""
    encoder, _ = network()
    encoder.eval()
    first = nn.Sequential(encoder.conv_stem, encoder.bn1, *encoder.blocks[:-1])
    parts = []
    for begin in range(0, len(images), 32):
        batch = torch.from_numpy(np.stack(images[begin : begin + 32])).permute(0, 3, 1, 2)
        parts.append(first(batch / 127.5 - 1).numpy())  # in -1..1, as these weights expect
    return np.concatenate(parts)


def split_of(folder: Path, name: Literal["train", "val", "test"]) -> Split:
    """A split of the photographs as the loop takes it, in this process.

    Args:
        folder: in the Office-31 layout; what is wrong with it is said as for any data set.
        name: of the split.
    """
    data = DataConfig(name="office31", path=str(folder), height=SIZE, width=SIZE)
    tasks = tasks_of(data)
    streams, rows = [], {}
    for photographs in open_streams(data, name):
        (domain,) = photographs.tasks
        samples = [photographs.load(number) for number in range(photographs.num_samples)]
        features = features_of([sample[IMAGE] for sample in samples])
        kept: list[Sample] = [
            {SAMPLE_ID: sample[SAMPLE_ID], "features": own, domain: sample[domain]}
            for sample, own in zip(samples, features, strict=True)
        ]
        stream = Stream(
            name=domain,
            kinds=photographs.kinds,
            num_samples=len(kept),
            load=kept.__getitem__,
            inputs=("features",),
        )
        streams.append(stream)
        rows[domain] = LocalRows(stream)
    make = functools.partial(make_model, tasks)
    return Split(streams=tuple(streams), rows=rows, tasks=tasks, make_model=make)
