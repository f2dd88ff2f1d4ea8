"""A checkpoint and an exported model say what their data were: a model is built again where the data are not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from repmtl_ray.config import DataConfig, Experiment, ExperimentError, ModelConfig, to_dict
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.description import code_digest, describe_task, tasks_of
from repmtl_ray.data.own_rows import open_own_rows
from repmtl_ray.data.stream import Normalization, Sample, Stream
from repmtl_ray.report.inspection import inspect_checkpoint
from repmtl_ray.runs import checkpoint, checkpoint_manager, loop
from repmtl_ray.runs.export import export_model, import_model, read_exported_description
from repmtl_ray.tasks import TASK_CLASSES, Classification, Depth, Segmentation, Task
from tests.helpers.asserts import assert_same

SIZE = (16, 24)
NORMALIZE = Normalization(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))


class Thickness(Depth):  # type: ignore[misc]
    """A task of the user's own."""

    unit: ClassVar[str] = "millimetres"


TASKS: tuple[Task, ...] = (
    Segmentation(name="parts", num_classes=5),
    Thickness(name="thickness"),
    Classification(name="scene", num_classes=3),
)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    model=ModelConfig(encoder="test_efficientnet", head="linear"),
    epochs=1,
    batch_size=2,
)


def load(index: int) -> Sample:
    rng = np.random.default_rng(index)
    return {
        "sample_id": np.int64(index),  # type: ignore[dict-item]
        "image": rng.random((*SIZE, 3), dtype=np.float32),
        "parts": rng.integers(0, 5, SIZE),
        "thickness": rng.random((*SIZE, 1), dtype=np.float32),
        "scene": rng.integers(0, 3, ()),
    }


def split(tasks: tuple[Task, ...] = TASKS, normalize: Normalization = NORMALIZE) -> loop.Split:
    kinds = {task.name: task.kind for task in tasks}
    stream = Stream(name="own", kinds=kinds, num_samples=4, load=load, normalize=normalize)
    return loop.Split(
        streams=(stream,), rows={"own": LocalRows(stream)}, tasks=tasks, image_size=SIZE
    )


def train(at: Path, **options: Any) -> torch.nn.Module:
    parts, _ = loop.run(
        EXPERIMENT,
        train=options.pop("train", split()),
        evaluation=split(),
        report=lambda metrics, snapshot: snapshot.save(at),
        **options,
    )
    return parts.model.eval()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    at = tmp_path_factory.mktemp("stored") / "checkpoint"
    return at, train(at)


def predictions_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(torch.linspace(0, 1, 2 * 3 * 16 * 24).reshape(2, 3, *SIZE))


def test_a_model_of_custom_data_predicts_the_same_once_it_is_read(
    stored: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    at, trained = stored
    assert_same(predictions_of(checkpoint.read_model(at)), predictions_of(trained))
    export_model(at, tmp_path / "model.safetensors")
    model, experiment = import_model(tmp_path / "model.safetensors")
    assert_same(predictions_of(model), predictions_of(trained))
    assert experiment == EXPERIMENT


def test_tasks_image_size_and_normalisation_are_in_both_files(
    stored: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    at, _ = stored
    export_model(at, tmp_path / "model.safetensors")
    for data in (
        checkpoint.read_description(at),
        read_exported_description(tmp_path / "model.safetensors"),
    ):
        assert (data.image_size, data.normalize) == (SIZE, NORMALIZE)
        assert data.tasks == tuple(map(describe_task, TASKS))


OTHERS = {
    "another number of classes": (
        split((Segmentation(name=TASKS[0].name, num_classes=7), *TASKS[1:])),
        "task parts: num_outputs was 5, is 7",
    ),
    "another class of task": (
        split((TASKS[0], Depth(name="thickness"), TASKS[2])),
        "class_name was '.*Thickness', is 'Depth'",
    ),
    "another normalisation": (
        split(normalize=NORMALIZE._replace(std=(1.0, 1.0, 1.0))),
        r"deviation was \[1.0, 2.0, 4.0\], is \[1.0, 1.0, 1.0\]",
    ),
    "one task less": (split(TASKS[:2]), "tasks were parts, thickness, scene, are parts, thickness"),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_does_not_go_on_with_other_settings_of_its_data(
    stored: tuple[Path, torch.nn.Module], tmp_path: Path, other: loop.Split, message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        train(tmp_path, train=other, resume_from=stored[0])


def without_description(at: Path, to: Path) -> Path:
    """A checkpoint as earlier versions wrote it."""
    to.mkdir()
    marker = checkpoint_manager.read_marker(str(at))
    for name in marker.files.keys() - {checkpoint.DATA_FILE}:
        (to / name).write_bytes((at / name).read_bytes())
    files = {name: marker.files[name] for name in marker.files if name != checkpoint.DATA_FILE}
    text = checkpoint_manager.marker_text(dataclasses.replace(marker, files=files))
    (to / checkpoint_manager.MARKER_FILE).write_text(text)
    return to


def test_an_older_file_of_custom_data_says_what_is_missing(
    stored: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    older = without_description(stored[0], tmp_path / "older")
    with pytest.raises(ValueError, match=r"has no data\.json: .*tasks and the image size"):
        checkpoint.read_model(older)
    train(tmp_path / "on", resume_from=older)
    exported = tmp_path / "older.safetensors"
    save_file({}, exported, metadata={"experiment": json.dumps(to_dict(EXPERIMENT))})
    with pytest.raises(ValueError, match=r"has no data\.json"):
        import_model(exported)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tasks": 3, "image_size": [8, 8]}', '{"tasks": [{}], "x": 1}']
)
def test_a_description_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="f does not describe the data of a model") as caught:
        checkpoint.description_from(text, "f")
    assert "\n" not in str(caught.value)


def test_tasks_of_this_project_are_made_again_and_others_must_be_handed_over() -> None:
    made = (Segmentation(name="a", num_classes=2), Classification(name="b", num_classes=9))
    made += tuple(
        cls(name=cls.__name__, **({"num_labels": 3} if cls.__name__ == "MultiLabel" else {}))
        for cls in TASK_CLASSES[2:]
    )  # type: ignore[assignment]
    stored = checkpoint.DataDescription(tasks=tuple(map(describe_task, made)), image_size=SIZE)
    assert tasks_of(stored) == made
    own = checkpoint.DataDescription(tasks=(describe_task(TASKS[1]),), image_size=SIZE)
    with pytest.raises(ValueError, match="whose code no file of a model holds"):
        tasks_of(own)


def test_the_digest_of_a_class_follows_its_code_and_its_parents() -> None:
    def made(text: str) -> type:
        scope: dict[str, Any] = {"Depth": Depth, "__name__": "typed"}
        exec(text, scope)
        return scope["Mine"]

    plain = "class Mine(Depth):\n    def loss_sum(self, p, t): return p.{}()"
    assert code_digest(made(plain.format("sum"))) == code_digest(made(plain.format("sum")))
    assert code_digest(made(plain.format("sum"))) != code_digest(made(plain.format("mean")))
    child = (
        "class Parent(Depth):\n    def loss_sum(self, p, t): return {}\nclass Mine(Parent): pass"
    )
    assert code_digest(made(child.format("p + 1"))) != code_digest(made(child.format("p + 2")))
    assert code_digest(Thickness) != code_digest(made("class Mine(Depth): pass"))


def write_rows(folder: Path, count: int = 3, **changes: Any) -> Path:
    """Rows as `Dataset.write_parquet` leaves them: tensors, and numbers for classes."""
    folder.mkdir()
    rows = [{**load(index), **changes} for index in range(count)]
    columns = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        is_scalar = values.ndim == 1
        columns[name] = (
            pa.array(values) if is_scalar else pa.FixedShapeTensorArray.from_numpy_ndarray(values)
        )
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder


KNOWN = (TASKS[0], Depth(name="thickness"), TASKS[2])


def test_a_model_of_custom_data_is_looked_at_with_rows_of_parquet_files(tmp_path: Path) -> None:
    train(tmp_path / "checkpoint", train=split(KNOWN))
    with pytest.raises(ValueError, match="data of your own; give a folder of Parquet files"):
        inspect_checkpoint(tmp_path / "checkpoint")
    rows = write_rows(tmp_path / "rows")
    seen = inspect_checkpoint(tmp_path / "checkpoint", num_images=2, data_path=str(rows))
    assert seen.tasks == [task.name for task in KNOWN]
    np.testing.assert_array_equal(
        seen.targets["parts"], np.stack([load(n)["parts"] for n in (0, 1)])
    )
    np.testing.assert_array_equal(seen.targets["scene"], [load(n)["scene"] for n in (0, 1)])
    assert np.isfinite(seen.saliency).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((8, 8, 3), np.float32)}, "the model was trained on 16 x 24"),
        ({"scene": np.int64(7)}, "row 0: scene"),
        ({"parts": np.full(SIZE, 9)}, "row 0: parts"),
    ],
)
def test_rows_that_are_not_as_in_training_are_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = checkpoint.DataDescription(tasks=tuple(map(describe_task, KNOWN)), image_size=SIZE)
    rows = write_rows(tmp_path / "rows", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_own_rows(rows, data, 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read as Parquet files"):
        open_own_rows(tmp_path / "nowhere", data, 1)
    other = dataclasses.replace(data, tasks=(describe_task(Depth(name="far")),))
    with pytest.raises(ValueError, match="has no column far; it has"):
        open_own_rows(rows, other, 1)
