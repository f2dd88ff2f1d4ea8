"""SegNet with MTAN's attention: its size, which parameters a task reaches, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray import protocols
from repmtl_ray.config import DataConfig, ModelConfig, RegularizerConfig
from repmtl_ray.models import build_model
from repmtl_ray.models.segnet import SegNetMTAN
from repmtl_ray.runs import loop
from repmtl_ray.tasks import Depth, InverseDepth, Normals, Segmentation
from tests.helpers.checkpoints import small_experiment, split_of

MTAN = ModelConfig(encoder="segnet_mtan", head="mtan", output_stride=None)
TASKS = (
    Segmentation(name="segmentation", num_classes=13),
    Depth(name="depth"),
    Normals(name="normal"),
)


def test_it_has_as_many_parameters_as_nash_mtls() -> None:
    """44.1 million for NYUv2's three tasks, counted in nash-mtl's layers, biases and all."""
    filters = [64, 128, 256, 512, 512]

    def convolution(a: Any, b: Any, size: int = 3) -> Any:
        return a * b * size**2 + b

    def normed(a: Any, b: Any) -> Any:
        return convolution(a, b) + 2 * b

    def attention(a: Any, b: Any) -> Any:
        return convolution(a, b, 1) + convolution(b, b, 1) + 4 * b

    expected = normed(3, 64) + normed(64, 64)
    expected += 2 * normed(64, 64) + attention(64, 64) * 3 + attention(128, 64) * 3
    expected += normed(64, 128) + normed(64, 64)
    for i in range(4):
        expected += normed(filters[i], filters[i + 1]) + normed(filters[i + 1], filters[i])
        times = 1 if i == 0 else 2
        expected += times * (
            normed(filters[i + 1], filters[i + 1]) + normed(filters[i], filters[i])
        )
        expected += 3 * attention(2 * filters[i + 1], filters[i + 1])
        expected += 3 * attention(filters[i + 1] + filters[i], filters[i])
        if i < 3:
            expected += normed(filters[i + 1], filters[i + 2]) + normed(filters[i + 1], filters[i])
        else:
            expected += 2 * normed(filters[4], filters[4])
    with torch.device("meta"):
        network = SegNetMTAN(3)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_a_task_reaches_the_shared_layers_and_its_own_attention_alone() -> None:
    model = build_model(MTAN, TASKS, image_size=(32, 64))
    predictions = model(torch.rand(2, 3, 32, 64))
    assert {name: tuple(p.shape) for name, p in predictions.items()} == {
        "segmentation": (2, 13, 32, 64),
        "depth": (2, 1, 32, 64),
        "normal": (2, 3, 32, 64),
    }
    predictions["depth"].square().sum().backward()
    reached = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert any(name.startswith("encoder.down.0") for name in reached)
    assert any(name.startswith("encoder.carry_up.0") for name in reached)
    assert any(name.startswith("encoder.tasks.1") for name in reached)
    assert not any(name.startswith(("encoder.tasks.0", "encoder.tasks.2")) for name in reached)
    assert {name.split(".")[1] for name in reached if name.startswith("heads")} == {"depth"}


def test_the_last10_setting_trains_a_step_with_penalties(scenes_cache: Path) -> None:
    data = DataConfig(name="cityscapes", height=32, width=64, num_train=4, num_val=2)
    official = protocols.settings("last10", data)
    assert official.model == MTAN
    experiment = small_experiment(
        data=data, model=MTAN, batch_size=2, regularizer=RegularizerConfig()
    )
    _, progress = loop.run(
        experiment,
        train=split_of(experiment, "train"),
        evaluation=split_of(experiment, "val"),
    )
    assert progress.history[0]["rep_mtl/csa"] != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "segnet_mtan", "output_stride": None}, "head 'mtan' with encoder"),
        ({"head": "mtan"}, "and only there"),
        ({"encoder": "segnet_mtan", "head": "mtan"}, "trained from scratch"),
        (
            {"encoder": "segnet_mtan", "head": "mtan", "output_stride": None, "pretrained": True},
            "trained from scratch",
        ),
    ],
)
def test_what_does_not_fit_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_sizes_that_cannot_be_halved_five_times_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        build_model(MTAN, (InverseDepth(name="depth"), TASKS[0]), image_size=(72, 96))
