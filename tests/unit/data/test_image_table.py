"""A table of photographs and labels: columns are tasks, empty cells unknown labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from repmtl_ray.config import DataConfig, Experiment, ModelConfig, RegularizerConfig
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams, tasks_of
from repmtl_ray.runs import loop
from repmtl_ray.tasks import Binary, Classification, Regression

HEADER = "image,split,kind,smiles,age,note\n"
ROWS = [
    f"faces/{n}.png,{('train', 'train', 'val', 'test')[n % 4]},"
    f"{('cat', 'dog', 'ant', '')[n % 4 if n > 3 else n % 3]},{(0, 1, '')[n % 3]},{n + 0.5},{n % 5}\n"
    for n in range(12)
]


def make(root: Path, text: str = HEADER + "".join(ROWS)) -> Path:
    (root / "faces").mkdir(parents=True, exist_ok=True)
    for n in range(12):
        pixels = np.random.default_rng(n).integers(0, 256, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"faces/{n}.png")
    (root / "labels.csv").write_text(text)
    return root / "labels.csv"


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        **{"name": "image_table", "path": str(path), "height": 32, "width": 32, **changes}
    )


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_columns_are_tasks_and_empty_cells_are_unknown_labels(tmp_path: Path, form: str) -> None:
    path = make(tmp_path)
    if form == "parquet":
        options = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        table = pyarrow.csv.read_csv(path, convert_options=options)
        path = tmp_path / "labels.parquet"
        pyarrow.parquet.write_table(table, path)
    assert tasks_of(config(path)) == (
        Classification(name="kind", num_classes=3),
        Binary(name="smiles"),
        Regression(name="age"),
        Classification(name="note", num_classes=5),
    )
    (train,) = open_streams(config(path), "train")
    assert train.num_samples == 6
    third = train.load(2)  # row 4
    assert third["image"].shape == (32, 32, 3)
    assert {
        name: third[name].item() for name in ("kind", "smiles", "age", "note", "sample_id")
    } == {
        "kind": 1,  # ant, cat, dog
        "smiles": 1,
        "age": 4.5,
        "note": 4,
        "sample_id": 2,
    }
    (test,) = open_streams(config(path), "test")
    assert [test.load(n)["kind"].item() for n in range(3)] == [1, -1, -1]
    assert test.load(2)["smiles"].item() == -1


def test_without_a_column_of_splits_they_are_drawn_once(tmp_path: Path) -> None:
    text = HEADER.replace("split,", "") + "".join(
        ",".join(cells[:1] + cells[2:]) for cells in (row.split(",") for row in ROWS)
    )
    data = config(make(tmp_path, text))
    counts = [open_streams(data, s)[0].num_samples for s in ("train", "val", "test")]  # type: ignore[arg-type]
    assert sum(counts) == 12
    assert counts == [8, 2, 2]
    assert open_streams(data, "train")[0].notes


def test_a_table_is_trained_on(tmp_path: Path) -> None:
    data = config(make(tmp_path))
    experiment = Experiment(
        data=data,
        model=ModelConfig(
            encoder="test_efficientnet", features="pooled", head="linear", output_stride=None
        ),
        regularizer=RegularizerConfig(lambda_tsr=0.1, lambda_csa=0.1),
        tasks=("kind", "age"),
        epochs=1,
        batch_size=3,
    )
    splits = []
    for split in ("train", "val"):
        streams = open_streams(data, split)  # type: ignore[arg-type]
        splits.append(loop.Split(streams=streams, rows={s.name: LocalRows(s) for s in streams}))
    _, progress = loop.run(experiment, train=splits[0], evaluation=splits[1])
    assert {"kind/accuracy", "age/rmse"} <= progress.history[0].keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,kind\n", "has the columns image, kind and 0 rows"),
        ("file,kind\nfaces/1.png,3\n", r"columns file, kind .*expected rows with a column 'image'"),
        ("image,split,a\nfaces/1.png,dev,3\n", "has the splits dev; expected train, val, test"),
        ("image,split,a\nfaces/1.png,train,only\n", "column 'a' has the classes 0 to 0"),
        ("image,split,a\nfaces/1.png,train,-7\nfaces/2.png,train,3\n", "classes -7 to 3"),
        ("image,split,a\nfaces/99.png,train,5\n", r"1 photographs .*'train' are missing: faces/99"),
        ("image,split,a\nfaces/1.png,val,5\n", "has no row of the split 'train'"),
    ],
)
def test_a_table_that_means_nothing_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"image_table: .*{message}") as caught:
        open_streams(config(make(tmp_path, text)), "train")
    assert "\n" not in str(caught.value)


def test_a_table_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"image_table: .*set data.path to a .csv or .parquet file"
    ):
        tasks_of(config(tmp_path / "no.csv"))
