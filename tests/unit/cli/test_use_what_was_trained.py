"""`evaluate` and `predict`: what they print and write is what the model computes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repmtl_ray import evaluate, load_model, predict
from repmtl_ray.config import DataConfig, ModelConfig
from repmtl_ray.inference import TrainedModel
from repmtl_ray.models.heads import HasHead
from repmtl_ray.report.predictions import read_photograph
from repmtl_ray.runs.export import export_model
from tests.helpers.commands import call
from tests.helpers.training import run, small_experiment

pytestmark = pytest.mark.usefixtures("scenes_cache")


@pytest.fixture(scope="module")
def exported(scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained = run(small_experiment(epochs=1), checkpoints=folder)
    export_model(trained.checkpoints[1], folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two of other sizes than the model's, one of them in a subfolder; and a file of another kind."""
    folder = tmp_path / "photographs"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, size in {"a.png": (48, 80), "sub/b.png": (32, 64)}.items():
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no photograph")
    return folder


def pixels(path: Path) -> Any:
    """The stored values of a PNG; of a palette, not its colours."""
    with Image.open(path) as image:
        return np.asarray(image)


def test_evaluate_prints_the_models_metrics(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluate(load_model(exported))
    call("evaluate", exported, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == {"checkpoint": str(exported), "split": "val", "metrics": expected}
    call("evaluate", exported, "--split", "train")
    printed = capsys.readouterr().out
    assert "cityscapes, train split" in printed
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines()}
    value = evaluate(load_model(exported), "train")["segmentation/miou"]
    assert lines["segmentation", "miou"] == [f"{value:.4f}", "higher"]
    assert lines["depth", "abs_error"][1] == "lower"
    assert lines["depth", "loss"][1:] == []


def test_predict_writes_numbers_and_pictures_of_the_models_predictions(
    exported: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call("predict", exported, photographs, "--out", out)
    model = load_model(exported)
    images = [read_photograph(photographs / name, (32, 64)) for name in ("a.png", "sub/b.png")]
    expected = predict(model, np.stack(images))
    for index, name in enumerate("ab"):
        classes = expected["segmentation"][index].argmax(dim=0).numpy()
        depth = expected["depth"][index].numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(np.load(out / f"{name}.segmentation.npy"), classes)
        np.testing.assert_array_equal(pixels(out / f"{name}.segmentation.png"), classes)
        np.testing.assert_array_equal(np.load(out / f"{name}.depth.npy"), depth)
        assert pixels(out / f"{name}.depth.png").shape == (32, 64, 3)
        panel = pixels(out / f"{name}.panel.png")
        assert panel.shape == (32, 3 * 64, 3)
        np.testing.assert_array_equal(panel[:, :64], images[index])
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    files = {row["file"] for row in rows}
    assert {path.name for path in out.iterdir()} == files | {"predictions.csv"}
    assert f"2 photographs, {len(files) + 1} files in {out}" in capsys.readouterr().out


def test_batches_and_forms_change_no_prediction(
    exported: Path, photographs: Path, tmp_path: Path
) -> None:
    call("predict", exported, photographs, "--out", tmp_path / "all")
    one = ["--batch-size", 1, "--write", "npy"]
    call(
        "predict",
        exported,
        photographs / "a.png",
        photographs / "sub",
        "--out",
        tmp_path / "one",
        *one,
    )
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {f"{n}.{t}.npy" for n in "ab" for t in ("segmentation", "depth")} | {
        "predictions.csv"
    }
    for name in names - {"predictions.csv"}:
        found, expected = (np.load(tmp_path / folder / name) for folder in ("one", "all"))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_that_are_classified_have_a_class_and_its_probability(
    tmp_path: Path, photographs: Path
) -> None:
    from repmtl_ray.data.description import describe
    from repmtl_ray.models import build_model
    from repmtl_ray.tasks import Classification

    task = Classification(name="art", num_classes=3)
    config = ModelConfig(
        encoder="test_efficientnet", features="pooled", output_stride=None, head="linear"
    )
    tasks: list[HasHead] = [task]
    torch.manual_seed(0)
    network = build_model(config, tasks, image_size=(32, 32), penalized=False).eval()
    experiment = small_experiment(data=DataConfig(name="office31", path="/d"), model=config)
    model = TrainedModel(
        network=network, experiment=experiment, data=describe([task], (32, 32), None)
    )
    from repmtl_ray.report.predictions import write_predictions

    paths = [photographs / "a.png"]
    (tmp_path / "o").mkdir()
    assert write_predictions(model, paths, tmp_path / "o", forms=["npy", "panels"]) == 1
    (row,) = csv.DictReader((tmp_path / "o/predictions.csv").read_text().splitlines())
    logits = predict(model, read_photograph(paths[0], (32, 32))[None])["art"][0]
    assert int(row["class"]) == int(logits.argmax())
    assert float(row["probability"]) == pytest.approx(float(logits.softmax(0).max()), abs=1e-6)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["nowhere.png"], "nowhere.png is neither a file nor a folder"),
        (["empty"], "empty holds no photograph; expected files in .jpg, .jpeg or .png"),
        (["notes.txt"], "notes.txt cannot be decoded"),
        (["a.png", "other/a.png"], "would both be predicted as 'a'"),
    ],
)
def test_wrong_photographs(
    exported: Path, photographs: Path, images: list[str], message: str, tmp_path: Path
) -> None:
    (photographs / "empty").mkdir()
    (photographs / "other").mkdir()
    (photographs / "other/a.png").write_bytes((photographs / "a.png").read_bytes())
    paths = [photographs / image for image in images]
    with pytest.raises(ValueError, match=message):
        call("predict", exported, *paths, "--out", tmp_path / "out")
