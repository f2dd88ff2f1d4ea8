"""What the writers of a run's numbers leave: the numbers of the loop, read back by each library."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from repmtl_ray.config import ExperimentError
from repmtl_ray.runs import loop
from repmtl_ray.runs.callbacks import Callback, StepInfo
from repmtl_ray.runs.checkpoint import Parts, Progress
from repmtl_ray.runs.loggers import LOGGERS, check_place, checked_callbacks, make_loggers
from repmtl_ray.runs.pictures import as_bytes, brightest, target_image
from tests.helpers.training import SaveAt, small_experiment, split

pytestmark = pytest.mark.usefixtures("scenes_cache")
NUM_STEPS = 4  # two epochs of two


class Remember(Callback):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[StepInfo] = []

    def on_step_end(self, step: StepInfo) -> None:
        self.steps.append(step)


def train(
    name: str, folder: Path, *, resume_from: Path | None = None, every: int = 1
) -> tuple[Progress, list[StepInfo], Path]:
    """A run with one writer: its progress, its steps, and a checkpoint after step 3."""
    remember, places = Remember(), SaveAt({3: folder / "saved"}, folder=str(folder))
    _, progress = loop.run(
        small_experiment(),
        train=split(small_experiment(), "train"),
        evaluation=split(small_experiment(), "val"),
        checkpoints=places,
        callbacks=[*make_loggers([name], every=every), remember],
        resume_from=resume_from,
    )
    return progress, remember.steps, folder / "saved"


def rows_of(path: Path) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in row.items()}
        for row in csv.DictReader(path.read_text().splitlines())
    ]


def test_csv_files_have_every_step_and_epoch_once_also_after_a_restart(tmp_path: Path) -> None:
    progress, steps, saved = train("csv", tmp_path)
    folder = tmp_path / "logs"
    found = rows_of(folder / "steps.csv")
    assert all(row.pop("samples_per_s") > 0 for row in found)
    expected = [{"global_step": step.global_step, **step.metrics} for step in steps]
    assert found == expected
    epochs = rows_of(folder / "epochs.csv")
    assert epochs == [pytest.approx(metrics) for metrics in progress.history]
    train("csv", tmp_path, resume_from=saved)  # goes on after step 3 of 4
    assert [row["global_step"] for row in rows_of(folder / "steps.csv")] == [1, 2, 3, 4]
    assert rows_of(folder / "epochs.csv") == epochs


def test_tensorboard_has_the_scalars_of_steps_and_epochs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress, steps, saved = train("tensorboard", tmp_path, every=2)
    train("tensorboard", tmp_path, resume_from=saved, every=2)
    log = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
    losses = log.Scalars("step/depth/train_loss")
    assert [event.step for event in losses] == [2, 4]
    expected = [step.metrics["depth/train_loss"] for step in steps[1::2]]
    assert [event.value for event in losses] == pytest.approx(expected)
    miou = log.Scalars("segmentation/miou")
    assert [event.step for event in miou] == [2, 4]
    assert [event.value for event in miou] == pytest.approx(
        [metrics["segmentation/miou"] for metrics in progress.history]
    )


@pytest.mark.filterwarnings("ignore")  # of the library
def test_mlflow_keeps_one_run_of_a_run_that_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    progress, steps, saved = train("mlflow", tmp_path)
    train("mlflow", tmp_path, resume_from=saved)
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "repmtl_ray"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "4"
    history = client.get_metric_history(run.info.run_id, "depth/abs_error")
    assert [metric.step for metric in history[:1]] == [2]
    assert history[-1].value == pytest.approx(progress.history[-1]["depth/abs_error"])
    losses = client.get_metric_history(run.info.run_id, "step/depth/train_loss")
    assert [metric.step for metric in losses] == [1, 2, 3, 4, 4]
    assert losses[0].value == pytest.approx(steps[0].metrics["depth/train_loss"])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # of the library
def test_wandb_keeps_the_numbers_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    progress, _, _ = train("wandb", tmp_path)
    (log,) = (tmp_path / "logs/wandb").glob("offline-run-*/run-*.wandb")
    found = wandb_history(log)
    last = {name: value for row in found for name, value in row.items()}
    assert last["depth/abs_error"] == pytest.approx(progress.history[-1]["depth/abs_error"])
    assert last["global_step"] == NUM_STEPS


def wandb_history(log: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, from the library's records in LevelDB's log format."""
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, rows, record = log.read_bytes(), [], b""
    place, block = 7, 32768  # after the library's mark
    while place + 7 <= len(content):
        if block - place % block < 7:  # no room for another header in this block
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = records.Record.FromString(record)
            items = parsed.history.item
            row = {
                "/".join([i.key] if i.key else i.nested_key): json.loads(i.value_json)
                for i in items
            }
            rows.append(row)
            record = b""
    return [row for row in rows if row]


def train_with_pictures(name: str, folder: Path) -> tuple[Parts, Progress]:
    """A run that writes the predictions for two scenes as PNG files, and with another writer."""
    return loop.run(
        small_experiment(),
        train=split(small_experiment(), "train"),
        evaluation=split(small_experiment(), "val"),
        checkpoints=SaveAt({}, folder=str(folder)),
        callbacks=make_loggers(["csv", name], every=0, images=2),
    )


def pixels(png: bytes | Path) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.array(image)


def png_files(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """What `csv` wrote, by task and step."""
    return {path.stem: pixels(path) for path in sorted((folder / "logs/pictures").glob("*.png"))}


PICTURES = [
    f"{task}.predictions.{step:06}" for task in ("depth", "segmentation") for step in (2, 4)
]


def test_pictures_show_images_targets_and_predictions_and_change_no_result(tmp_path: Path) -> None:
    parts, progress = train_with_pictures("csv", tmp_path)
    found = png_files(tmp_path)
    assert list(found) == PICTURES
    assert not np.array_equal(found["depth.predictions.000002"], found["depth.predictions.000004"])
    (stream,) = split(small_experiment(), "val").streams
    for row in range(2):
        scene = stream.load(row)
        image = torch.from_numpy(scene["image"]).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            predicted = parts.model.eval()(image)
        classes = predicted["segmentation"][0].argmax(0).numpy()
        inverse = predicted["depth"][0].permute(1, 2, 0).numpy()
        top = brightest(scene["depth"], "inverse_depth")
        expected = {
            "segmentation": [
                target_image(scene["segmentation"], "label"),
                target_image(classes, "label"),
            ],
            "depth": [
                target_image(values, "inverse_depth", nearest=top)
                for values in (scene["depth"], inverse)
            ],
        }
        for task, columns in expected.items():
            shown = found[f"{task}.predictions.000004"][32 * row : 32 * (row + 1)]
            panels = np.concatenate([as_bytes(c) for c in (scene["image"], *columns)], axis=1)
            assert shown.shape == (32, 3 * 64, 3)
            assert np.abs(shown.astype(int) - panels).max() <= 1, task  # batches of one and of two
    without, _, _ = train("csv", tmp_path / "without")
    assert progress.history == without.history


def test_tensorboard_has_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_with_pictures("tensorboard", tmp_path)
    log = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
    found = {
        f"{name.replace('/', '.')}.{event.step:06}": pixels(event.encoded_image_string)
        for name in log.Tags()["images"]
        for event in log.Images(name)
    }
    np.testing.assert_equal(found, png_files(tmp_path))


@pytest.mark.filterwarnings("ignore")  # of the library
def test_mlflow_keeps_the_pictures_beside_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    train_with_pictures("mlflow", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "repmtl_ray"]
    (run,) = client.search_runs([experiment.experiment_id])
    found = {}
    for file in client.list_artifacts(run.info.run_id, "images"):
        if file.path.endswith(".png"):
            name, step = Path(file.path).name.replace("%", "+").split("+")[:3:2]
            path = client.download_artifacts(run.info.run_id, file.path)
            found[f"{name}.{int(step):06}"] = pixels(Path(path))
    np.testing.assert_equal(found, png_files(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # of the library
def test_wandb_keeps_the_pictures_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    train_with_pictures("wandb", tmp_path)
    (run,) = (tmp_path / "logs/wandb").glob("offline-run-*")
    media = (run / "files/media/images").rglob("*.png")
    found = sorted(pixels(path).tobytes() for path in media)
    assert found == sorted(picture.tobytes() for picture in png_files(tmp_path).values())


def test_a_run_without_maps_has_no_pictures(tmp_path: Path) -> None:
    split_of_run = split(small_experiment(), "val")
    logger = make_loggers(["csv"], images=1)[0]
    run = loop.Training(
        small_experiment(), train=split_of_run, evaluation=split_of_run, checkpoints=SaveAt({}, folder=str(tmp_path)),
    )  # fmt: skip
    context = dataclasses.replace(run._context(), tasks=())
    with pytest.raises(ExperimentError, match="log_images: no task of this run predicts a map"):
        logger.on_run_start(context)


@pytest.mark.parametrize(
    ("images", "log", "message"),
    [
        (-1, ["csv"], "log_images is -1; expected a number of samples from 0"),
        (True, ["csv"], "log_images is True; expected"),
        (2, [], "log_images is 2, but log names none of csv, tensorboard, mlflow, wandb"),
    ],
)
def test_wrong_numbers_of_pictures(images: Any, log: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_callbacks([], log, 1, images)


@pytest.mark.parametrize(
    ("log", "every", "message"),
    [
        (["tensorbord"], 1, "log 'tensorbord': did you mean 'tensorboard'"),
        ("csv", 1, "log is 'csv'; expected a list of csv, tensorboard, mlflow, wandb"),
        (["csv"], -1, "log_every is -1; expected a number of steps from 0"),
    ],
)
def test_wrong_writers(log: Any, every: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_callbacks([], log, every)


def test_a_library_that_is_missing_is_named_with_its_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs wandb, .*; pip install "repmtl_ray\[loggers\]"'):
        make_loggers(["wandb"])
    assert len(make_loggers(["csv", "csv"])) == 1


def test_runs_in_a_bucket_have_no_folder_for_logs() -> None:
    check_place([], "s3://bucket/runs/a")
    check_place(list(LOGGERS), "/disk/runs/a")
    with pytest.raises(ValueError, match="log csv: the runs are in s3://bucket/runs/a"):
        check_place(["csv"], "s3://bucket/runs/a")


def test_only_the_first_worker_writes(tmp_path: Path) -> None:
    from repmtl_ray.collectives import ALONE

    (logger,) = make_loggers(["csv"])
    run = loop.Training(
        small_experiment(), train=split(small_experiment(), "train"), evaluation=split(small_experiment(), "val"),
        checkpoints=SaveAt({}, folder=str(tmp_path)),
    )  # fmt: skip
    second = dataclasses.replace(ALONE, rank=1)
    logger.on_run_start(dataclasses.replace(run._context(), workers=second))
    logger.on_epoch_end({"epoch": 1.0, "global_step": 2.0})
    logger.on_run_end(None)
    assert not (tmp_path / "logs").exists()
