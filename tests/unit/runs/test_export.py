"""An exported model is the trained one, in a file that cannot run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import replace, to_dict
from repmtl_ray.models import build_model
from repmtl_ray.runs import checkpoint, loop
from repmtl_ray.runs.checkpoint import Progress
from repmtl_ray.runs.export import METADATA_KEY, export_model, import_model
from tests.helpers.asserts import assert_same
from tests.helpers.training import small_experiment


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("stored") / "checkpoint"
    experiment = small_experiment(seed=5)
    tasks = loop.selected_tasks(experiment)
    parts = loop.build(experiment, tasks, device=torch.device("cpu"), workers=ALONE)
    checkpoint.Snapshot(experiment=experiment, parts=parts, progress=checkpoint.Progress()).save(
        folder
    )
    return folder, experiment, parts.model.eval()


def test_the_exported_model_predicts_as_the_trained_one(
    stored: tuple[Any, ...], tmp_path: Path
) -> None:
    folder, experiment, trained = stored
    assert export_model(folder, tmp_path / "m.safetensors") == experiment
    model, described = import_model(tmp_path / "m.safetensors")
    assert described == experiment
    images, rows = torch.rand(2, 3, 32, 64), {"segmentation": slice(0, 2), "depth": slice(0, 2)}
    with torch.no_grad():
        assert_same(model(images, rows), trained(images, rows))


def test_the_encoder_alone_is_what_model_weights_reads(
    stored: tuple[Any, ...], tmp_path: Path
) -> None:
    folder, experiment, trained = stored
    out = tmp_path / "encoder.safetensors"
    export_model(folder, out, encoder_only=True)
    other = replace(experiment, {"model.weights": str(out)})
    model = build_model(other.model, loop.selected_tasks(other), image_size=(32, 64))
    assert_same(dict(model.encoder.state_dict()), dict(trained.encoder.state_dict()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_refused_when_it_is_read(
    stored: tuple[Any, ...], tmp_path: Path, value: float
) -> None:
    _folder, experiment, trained = stored
    tensors = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    tensors["heads.depth.output.weight"][0, 0] = value
    message = r"heads.depth.output.weight holds 1 of \d+ values that are not finite"
    out = tmp_path / "diverged.safetensors"
    save_file(tensors, out, metadata={METADATA_KEY: json.dumps(to_dict(experiment))})
    with pytest.raises(ValueError, match=message):
        import_model(out)
    tasks = loop.selected_tasks(experiment)
    parts = loop.build(experiment, tasks, device=torch.device("cpu"), workers=ALONE)
    parts.model.load_state_dict(tensors)
    checkpoint.Snapshot(experiment=experiment, parts=parts, progress=Progress()).save(
        tmp_path / "c"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.read_model(tmp_path / "c")
    fresh = loop.build(experiment, tasks, device=torch.device("cpu"), workers=ALONE)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "c", experiment=experiment, parts=fresh)


def test_what_is_there_is_not_overwritten_and_what_is_no_model_is_refused(
    stored: tuple[Any, ...], tmp_path: Path
) -> None:
    folder, _, _ = stored
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_model(folder, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match="not a safetensors file"):
        import_model(out)
    save_file({"a": torch.zeros(1)}, out)
    with pytest.raises(ValueError, match="names no experiment"):
        import_model(out)
    export_model(folder, tmp_path / "encoder", encoder_only=True)
    with pytest.raises(ValueError, match=r"no model of this version.*is for model\.weights"):
        import_model(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"no complete\.json"):
        export_model(tmp_path / "nowhere", tmp_path / "n.safetensors")
    assert load_file(tmp_path / "encoder"), "the draft became the file"
    assert not list(tmp_path.glob("*.partial"))
