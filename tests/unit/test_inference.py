"""A trained model in use: loaded from a checkpoint or an export, evaluated and asked for predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray import evaluate, load_model, predict
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.collate import collate
from repmtl_ray.data.sources import open_streams
from repmtl_ray.inference import TrainedModel
from repmtl_ray.runs.export import export_model
from tests.helpers.asserts import assert_same
from tests.helpers.training import Run, run, small_experiment

pytestmark = pytest.mark.usefixtures("scenes_cache")


@pytest.fixture(scope="module")
def trained(scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(small_experiment(epochs=1), checkpoints=tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def model(trained: Run) -> TrainedModel:
    return load_model(trained.checkpoints[1])


def stored_images(model: TrainedModel) -> Any:
    (stream,) = open_streams(model.experiment.data, "val")
    return stream, LocalRows(stream).fetch(np.arange(stream.num_samples))


def test_a_loaded_model_has_the_metrics_of_its_last_epoch(
    trained: Run, model: TrainedModel
) -> None:
    metrics = evaluate(model)
    assert metrics == {name: trained.history[-1][name] for name in metrics}
    assert evaluate(model, "train") != metrics


def test_a_prediction_is_the_networks_output_for_the_stored_image(
    trained: Run, model: TrainedModel
) -> None:
    stream, samples = stored_images(model)
    batch = collate([(stream, samples)], list(stream.kinds), torch.float32)
    with torch.no_grad():
        expected = trained.parts.model.eval()(batch.images)
    for images in (samples["image"], torch.from_numpy(samples["image"])):
        assert_same(predict(model, images), expected)
    predictions = predict(model, samples["image"], batch_size=3)
    for task, prediction in predictions.items():
        torch.testing.assert_close(prediction, expected[task])


def test_an_exported_model_is_the_checkpoints(
    trained: Run, model: TrainedModel, tmp_path: Path
) -> None:
    export_model(trained.checkpoints[1], tmp_path / "m.safetensors")
    exported = load_model(str(tmp_path / "m.safetensors"))
    assert exported.experiment == model.experiment
    assert exported.data == model.data
    _, samples = stored_images(model)
    assert_same(predict(exported, samples["image"]), predict(model, samples["image"]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 16, 64, 3), np.uint8), r"shape \(2, 16, 64, 3\); expected \[N, 32, 64, 3\]"),
        (np.zeros((32, 64, 3), np.uint8), r"one image as images\[None\]"),
        (np.zeros((2, 3, 32, 64), np.float32), "images have shape"),
        (np.zeros((0, 32, 64, 3), np.uint8), "images have shape"),
        (np.zeros((2, 32, 64, 3), np.int64), r"images are torch.int64; expected uint8"),
    ],
)
def test_images_of_another_form_are_refused(model: TrainedModel, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(model, images)


def test_what_cannot_be_loaded_or_evaluated_is_refused(model: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="split is 'vall'; expected one of train, val"):
        evaluate(model, "vall")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict(model, np.zeros((1, 32, 64, 3), np.uint8), batch_size=0)
