"""A model that was written for use elsewhere predicts what it predicted here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from repmtl_ray import load_model
from repmtl_ray.config import DataConfig, Experiment, ModelConfig
from repmtl_ray.data.description import DataDescription, describe
from repmtl_ray.data.stream import Normalization
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.runs import programs
from repmtl_ray.runs.hub import HubModel
from repmtl_ray.tasks import Classification, InverseDepth, Segmentation, Task
from tests.helpers.commands import call
from tests.helpers.paths import ROOT
from tests.helpers.training import run, small_experiment

SIZE = (32, 64)
NORMALIZE = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
DENSE: list[Task] = [Segmentation(name="segmentation", num_classes=5), InverseDepth(name="depth")]
CLASSES: list[Task] = [
    Classification(name="art", num_classes=3),
    Classification(name="real", num_classes=4),
]
MODELS: dict[str, tuple[ModelConfig, list[Task]]] = {
    "ASPP": (
        ModelConfig(
            encoder="test_efficientnet", head_channels=8, atrous_rates=(2, 4), output_stride=8
        ),
        DENSE,
    ),
    "linear maps": (ModelConfig(encoder="test_resnet", head="linear"), DENSE),
    "channels last": (
        ModelConfig(encoder="swin_s3_tiny_224", head="linear", output_stride=None),
        DENSE,
    ),
    "pooled": (
        ModelConfig(
            encoder="test_efficientnet", features="pooled", output_stride=None, head="linear"
        ),
        CLASSES,
    ),
    "tokens": (
        ModelConfig(encoder="test_vit", features="tokens", output_stride=None, head="linear"),
        CLASSES,
    ),
}


def trained_like(kind: str) -> tuple[Experiment, DataDescription, MultiTaskModel, Tensor]:
    """A model with running statistics that are not those of a new one, and images for it."""
    config, tasks = MODELS[kind]
    torch.manual_seed(0)
    size = (224, 224) if kind == "channels last" else SIZE
    network = build_model(config, tasks, image_size=size, penalized=False).eval()
    with torch.no_grad():
        for module in network.modules():
            for name in ("running_mean", "running_var"):
                if isinstance(value := getattr(module, name, None), Tensor):
                    value.uniform_(0.5, 1.5)
    data = DataConfig(name="cityscapes", height=size[0], width=size[1])
    return (
        Experiment(data=data, model=config),
        describe(tasks, size, NORMALIZE),
        network,
        torch.rand(3, 3, *size),
    )


def expected_of(network: MultiTaskModel, images: Tensor) -> dict[str, Tensor]:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in NORMALIZE)
    with torch.no_grad():
        return network((images - mean) / deviation)


@pytest.mark.parametrize("kind", MODELS)
def test_the_script_of_the_documents_builds_the_model_with_timm_and_torch_alone(
    kind: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    experiment, data, network, images = trained_like(kind)
    description = programs.plain_description(experiment, data, network)
    programs.write_description(tmp_path / "m.json", description)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    text = (ROOT / "docs/export.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "repmtl_ray" not in code
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(code, "export.md", "exec"), names)
    with torch.no_grad():
        found = names["load"](str(tmp_path / "m"))(images)
    for task, expected in expected_of(network, images).items():
        torch.testing.assert_close(found[task], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("kind", ["linear maps"])
def test_a_program_of_torch_predicts_the_same_for_any_number_of_images(
    kind: str, tmp_path: Path
) -> None:
    _, data, network, images = trained_like(kind)
    programs.export_program(network, data, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    expected = expected_of(network, images)
    for number in (1, 3):
        found = program(images[:number])
        for task, prediction in zip(expected, found, strict=True):
            torch.testing.assert_close(prediction, expected[task][:number], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("kind", ["ASPP"])
def test_an_onnx_program_predicts_the_same_for_any_number_of_images(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    _, data, network, images = trained_like(kind)
    programs.export_onnx(network, data, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [task.name for task in data.tasks]
    expected = expected_of(network, images)
    for number in (1, 3):
        found = session.run(None, {"images": images[:number].numpy()})
        for task, prediction in zip(expected, found, strict=True):
            np.testing.assert_allclose(
                prediction, expected[task][:number].numpy(), rtol=1e-3, atol=1e-4
            )


@pytest.fixture(scope="module")
def saved(scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    return run(small_experiment(epochs=1), checkpoints=folder).checkpoints[1]


def test_a_folder_of_the_hub_is_the_model_with_a_card_of_the_run(
    saved: Path, tmp_path: Path
) -> None:
    call("export", saved, "--out", tmp_path / "hub")
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors"}
    model = HubModel.from_pretrained(str(tmp_path / "hub"))
    images = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        found, expected = model(images), load_model(saved).network(images)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task])
    card = (tmp_path / "hub/README.md").read_text()
    assert card.startswith("---\nlibrary_name: repmtl_ray\n")
    assert "# Segmentation and depth by one network" in card
    assert f"| depth/abs_error | {model.metrics['depth/abs_error']:.4f} |" in card


def test_the_end_of_the_name_says_which_form(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("export", saved, "--out", tmp_path / "m.safetensors")
    description = json.loads((tmp_path / "m.json").read_text())
    assert description["encoder"] == "test_efficientnet"
    assert [task["name"] for task in description["tasks"]] == ["segmentation", "depth"]
    call("export", saved, "--out", tmp_path / "e.safetensors", "--encoder")
    assert not (tmp_path / "e.json").exists()
    assert capsys.readouterr().out.count(" MB  experiment ") == 2
    for name, message in {
        "m.pth": r"ends in '\.pth'; expected \.safetensors, \.pt2, \.onnx, or a folder's name",
        "m.safetensors": "exists already; name another one, or remove it",
    }.items():
        with pytest.raises(ValueError, match=message):
            call("export", saved, "--out", tmp_path / name)
    with pytest.raises(ValueError, match=r"--encoder writes a \.safetensors file"):
        call("export", saved, "--out", tmp_path / "m.onnx", "--encoder")
