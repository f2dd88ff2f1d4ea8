"""Pretrained weights without a network: names, values, input scale, and what is said without them."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from repmtl_ray.config import ModelConfig
from repmtl_ray.data.stream import Normalization
from repmtl_ray.models import build_model, packaged
from repmtl_ray.models.encoders import check_available, efficientnet_lite0
from repmtl_ray.tasks import InverseDepth, Segmentation

TASKS = (Segmentation(name="segmentation", num_classes=4), InverseDepth(name="depth"))
LITE0 = ModelConfig(
    encoder="tf_efficientnet_lite0",
    weights="efficientnet_lite0",
    input_scale="symmetric",
    output_stride=16,
    head="linear",
    dropout=0.0,
)


def test_the_packages_entries_take_timms_names_in_order() -> None:
    """The package's own names say the same as timm's, part by part."""
    original = torch.load(packaged.packaged_file(), map_location="cpu", weights_only=True)
    renamed = efficientnet_lite0()
    assert len(renamed) == len(original) == 296
    for (old, value), (new, copy) in zip(original.items(), renamed.items(), strict=True):
        assert torch.equal(value, copy)
        assert old.rpartition(".")[2] == new.rpartition(".")[2]  # weight, bias, running_mean, ...
        assert ("bn" in old) == ("bn" in new)
        assert ("depthwise" in old) == ("conv_dw" in new), (old, new)
    timm.create_model("tf_efficientnet_lite0").load_state_dict(renamed)


def test_a_model_starts_from_them_and_sees_images_in_minus_one_to_one() -> None:
    model = build_model(LITE0, TASKS, image_size=(32, 32)).eval()
    plain = timm.create_model(
        "tf_efficientnet_lite0", features_only=True, out_indices=(-1,), output_stride=16
    )
    stem = efficientnet_lite0()["conv_stem.weight"]
    assert torch.equal(dict(model.encoder.named_parameters())["conv_stem.weight"], stem)
    plain.load_state_dict(model.encoder.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), plain.eval()((images - 0.5) / 0.5)[-1])
    normalize = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    office = build_model(LITE0, TASKS, image_size=(32, 32), normalize=normalize).eval()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in normalize)
    with torch.no_grad():
        torch.testing.assert_close(
            office.encoder((images - mean) / std), model.encoder(images), rtol=1e-3, atol=1e-4
        )


def test_the_momentum_of_batch_norm_is_an_argument() -> None:
    def momenta(value: float | None) -> set[Any]:
        config = ModelConfig(
            encoder="tf_efficientnet_lite0",
            output_stride=16,
            head="linear",
            batch_norm_momentum=value,
        )
        model = build_model(config, TASKS, image_size=(32, 32))
        kinds = nn.modules.batchnorm._BatchNorm
        return {m.momentum for m in model.encoder.modules() if isinstance(m, kinds)}

    assert momenta(None) == {0.1}  # timm's for this network; 0.01 in the code that trained it
    assert momenta(0.3) == {0.3}


def test_without_the_package_one_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r'pip install "repmtl_ray\[pretrained\]"'):
        check_available(LITE0)
    with pytest.raises(ValueError, match=r'pip install "repmtl_ray\[pretrained\]"'):
        build_model(LITE0, TASKS, image_size=(32, 32))


def test_another_package_is_not_loaded_as_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(OrderedDict(weight=torch.ones(2)), tmp_path / "other.pth")
    monkeypatch.setattr(packaged, "packaged_file", lambda: tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not hold the 296 entries"):
        efficientnet_lite0()


@pytest.mark.parametrize(
    "changes", [{"encoder": "resnet18", "input_scale": "symmetric"}, {"input_scale": "data"}]
)
def test_weights_for_another_encoder_or_input_are_refused(changes: dict[str, Any]) -> None:
    settings = {"encoder": "tf_efficientnet_lite0", "weights": "efficientnet_lite0", **changes}
    with pytest.raises(ValueError, match="expected 'tf_efficientnet_lite0' and 'symmetric'"):
        ModelConfig(**settings)
