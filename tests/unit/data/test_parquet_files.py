"""Parquet mirrors: columns, names and order of files, and what is wrong with a broken one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repmtl_ray.data import parquet_files
from tests.helpers import forms
from tests.helpers.forms import (
    assert_samples,
    cut,
    frames_of,
    make_parquet,
    mirrored,
    opened,
    refused,
    write_parquet,
)


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    rename = {"segmentation": "segmentation_19", "image": "left"}
    make_parquet(tmp_path, "cityscapes", rename=rename)
    expected = (
        r"cityscapes: data/train-00000-of-00002\.parquet has no column 'image' for image; its "
        r"columns are left \(list<.*\), segmentation_19 \(.*data\.columns, for example \{'image': "
    )
    refused(tmp_path, "cityscapes", expected)
    stream = opened(tmp_path, "cityscapes", columns=rename)
    assert_samples(stream, frames_of("cityscapes", "train"))
    refused(tmp_path, "cityscapes", "has 'lable', which is no column", columns={"lable": "x"})


def test_names_of_files_may_end_in_a_digest(tmp_path: Path) -> None:
    make_parquet(tmp_path, "nyuv2")
    for file in (tmp_path / "data").iterdir():
        file.rename(file.with_name(f"{file.stem}-0a1b2c.parquet"))
    assert_samples(opened(tmp_path, "nyuv2"), frames_of("nyuv2", "train"))


def test_rows_come_in_any_order_and_from_another_process(tmp_path: Path) -> None:
    stream = opened(make_parquet(tmp_path, "nyuv2"), "nyuv2")
    expected = frames_of("nyuv2", "train")
    again = pickle.loads(pickle.dumps(stream))
    for index in (4, 0, 3, 3, 1, 2, 0):
        np.testing.assert_array_equal(again.load(index)["depth"], expected[index]["depth"])


def test_reading_upwards_decodes_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [mirrored(forms.cityscapes_frame(index)) for index in range(40)]
    write_parquet(tmp_path / "train.parquet", frames, rows_per_group=20)
    decoded = []
    iterate = pq.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        for batch in iterate(self, *args, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    stream = opened(tmp_path, "cityscapes")
    decoded.clear()
    for index in range(1, 40):
        stream.load(index)
    assert sum(decoded) <= 40 + parquet_files._ROWS_AT_ONCE
    decoded.clear()
    stream.load(21)
    assert sum(decoded) <= parquet_files._ROWS_AT_ONCE


def _spoil_pages(root: Path) -> None:
    """The file's footer is whole, its numbers are not."""
    file = root / "data/train-00000-of-00002.parquet"
    data = bytearray(file.read_bytes())
    metadata = pq.ParquetFile(file).metadata
    for number in range(metadata.num_columns):
        chunk = metadata.row_group(1).column(number)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(data)


def _without_rows(root: Path) -> None:
    file = root / "data/val-00000-of-00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)


def _another_row(change: Any) -> Callable[..., Any]:
    def spoil(root: Path) -> None:
        rows = [mirrored(arrays) for arrays in frames_of("cityscapes", "train")[:3]]
        change(rows[1])
        write_parquet(root / "data/train-00000-of-00002.parquet", rows)

    return spoil


def _ragged(root: Path) -> None:
    file = root / "data/train-00000-of-00002.parquet"
    table = pq.read_table(file)
    rows = table.column("depth").to_pylist()
    rows[1][0][3].pop()
    position = table.schema.get_field_index("depth")
    pq.write_table(
        table.set_column(position, "depth", pa.array(rows, table.schema.field(position).type)), file
    )


BROKEN_MIRRORS = {
    "cut off": (
        lambda root: cut(root / "data/train-00001-of-00002.parquet", 900),
        "train",
        None,
        r"cityscapes: data/train-00001-of-00002\.parquet is not a complete Parquet file \(.*; copy",
    ),
    "spoilt in the middle": (
        _spoil_pages,
        "train",
        2,
        r"data/train-00000-of-00002\.parquet row 2 cannot be read \(.*\); copy the file again",
    ),
    "a file is missing": (
        lambda root: (root / "data/train-00001-of-00002.parquet").unlink(),
        "train",
        None,
        r"number 00001 of 2 is missing .*, as train-00000-of-00002\.parquet says; there are data/tr",
    ),
    "no rows": (
        _without_rows,
        "val",
        None,
        r"val-00000-of-00001\.parquet has no rows in split val",
    ),
    "no such split": (
        lambda root: (root / "data/val-00000-of-00001.parquet").unlink(),
        "val",
        None,
        r"no Parquet files of the split val; expected val-\*\.parquet or validation-\*\.parquet, .*"
        r"it holds data/train-00000",
    ),
    "labels out of range": (
        _another_row(lambda row: row["segmentation"].__setitem__((0, 0), 19)),
        "train",
        1,
        r"data/train-00000-of-00002\.parquet row 1 column segmentation has the labels 19; expected",
    ),
    "ragged": (
        _ragged,
        "train",
        1,
        r"row 1 column depth is ragged; expected nested lists of equal",
    ),
    "another type": (
        lambda root: write_parquet(
            root / "data/train-00001-of-00002.parquet",
            [
                {
                    name: values.astype(np.float64)
                    for name, values in mirrored(forms.cityscapes_frame(0)).items()
                }
            ],
        ),
        "train",
        None,
        r"00001-of-00002\.parquet column image is list<.*double.*, expected list<.*float.* as in data/t",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MIRRORS)
def test_a_broken_mirror_is_refused(tmp_path: Path, case: str) -> None:
    spoil, split, frame, message = BROKEN_MIRRORS[case]
    spoil(make_parquet(tmp_path, "cityscapes"))
    refused(tmp_path, "cityscapes", message, frame=frame, split=split)


def write_splits(root: Path, *files: str) -> Path:
    """Every file holds the same two rows."""
    for file in files:
        write_parquet(root / file, [mirrored(forms.nyuv2_frame(index)) for index in range(2)])
    return root


COMPLETE_SETS = {
    "the hub's conversion": ("default/train/0000.parquet", "default/train/0001.parquet"),
    "another configuration's name": ("nyuv2/train/0000.parquet", "nyuv2/train/0001.parquet"),
    "digests": (
        "data/train-00000-of-00002-0a1b.parquet",
        "data/train-00001-of-00002-9f2c.parquet",
    ),
    "a folder for each split": ("train/a.parquet", "train/b.parquet"),
    "numbers without a total": ("train-0.parquet", "train-1.parquet"),
    "hidden files beside": (
        "train-00000-of-00001.parquet",
        "train/.ipynb_checkpoints/train-00000-of-00001.parquet",
        ".cache/train-00000-of-00001.parquet",
        "._train-00000-of-00001.parquet",
    ),
}


@pytest.mark.parametrize("case", COMPLETE_SETS)
def test_every_layout_of_the_hub_is_found(tmp_path: Path, case: str) -> None:
    files = COMPLETE_SETS[case]
    validation = [file.replace("train", "validation") for file in files]
    write_splits(tmp_path, *files, *validation)
    num_visible = sum("/." not in f"/{file}" for file in files)
    for split in ("train", "val"):
        assert opened(tmp_path, "nyuv2", split).num_samples == 2 * num_visible


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10, 1, *range(3, 10)):
        row = mirrored(forms.nyuv2_frame(number))
        write_parquet(tmp_path / f"train-{number}.parquet", [row])
    stream = opened(tmp_path, "nyuv2")
    for number in range(11):
        expected = forms.nyuv2_frame(number)["depth"]
        np.testing.assert_array_equal(stream.load(number)["depth"], expected)


INCOMPLETE_SETS = {
    "a number is missing": (
        ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
        "number 00001 of 3 is missing",
    ),
    "a number is beyond the total": (
        ("train-00000-of-00002.parquet", "train-00002-of-00002.parquet"),
        "number 00001 of 2 is missing .* there are train-00000-of-00002.parquet, train-00002-of",
    ),
    "one file too many": (
        ("data/train-00000-of-00001.parquet", "data/train-00001-of-00001.parquet"),
        "train-00001-of-00001.parquet is beyond the last number, 0",
    ),
    "a number comes twice": (
        ("train-00000-of-00002-aa.parquet", "train-00000-of-00002-bb.parquet"),
        "train-00000-of-00002-aa.parquet and train-00000-of-00002-bb.parquet have the same number",
    ),
    "two totals": (
        ("train-00000-of-00002.parquet", "train-00001-of-00003.parquet"),
        "names give 2 and 3 as the number of files",
    ),
    "a total in one name only": (
        ("train-00000-of-00002.parquet", "train-00001.parquet"),
        "names give no total and 2 as the number of files",
    ),
    "a gap in the hub's conversion": (
        ("default/train/0000.parquet", "default/train/0002.parquet"),
        "number 0001 of 2 is missing",
    ),
    "the hub's first file is missing": (
        ("default/train/0001.parquet",),
        "number 0000 of 1 is missing",
    ),
    "two spellings of a split": (
        ("validation-00000-of-00001.parquet", "val-00000-of-00001.parquet"),
        r"val-\* and validation-\* are several sets",
    ),
    "whole and partial": (
        ("default/train/0000.parquet", "default/partial-train/0000.parquet"),
        r"default/partial-train/\* and default/train/\* are several sets",
    ),
    "several configurations": (
        ("small/train/0000.parquet", "large/train/0000.parquet"),
        "holds 2 configurations side by side: large, small; set data.path to the folder of one",
    ),
    "configurations of different splits": (
        ("small/train-00000-of-00001.parquet", "large/val-00000-of-00001.parquet"),
        "holds 2 configurations side by side: large, small",
    ),
    "the folder itself and another": (
        ("train-00000-of-00001.parquet", "default/train/0000.parquet"),
        "holds 2 configurations side by side: default, the folder itself",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE_SETS)
def test_files_that_are_not_one_complete_set_are_refused(tmp_path: Path, case: str) -> None:
    files, message = INCOMPLETE_SETS[case]
    split = "val" if case == "two spellings of a split" else "train"
    refused(write_splits(tmp_path, *files), "nyuv2", message, split=split)
    if split == "train" and "configurations" not in message:
        validation = [file.replace("train", "val") for file in files]
        refused(
            write_splits(tmp_path, *validation),
            "nyuv2",
            message.replace("train", "val"),
            split="val",
        )


def test_one_of_several_configurations_can_be_chosen(tmp_path: Path) -> None:
    write_splits(tmp_path, "small/train/0000.parquet", "large/train/0000.parquet")
    assert opened(tmp_path / "small", "nyuv2").num_samples == 2


def test_a_partial_conversion_is_read_with_a_note(tmp_path: Path) -> None:
    root = write_splits(
        tmp_path, "default/partial-train/0000.parquet", "default/validation/0000.parquet"
    )
    incomplete = "the split train is incomplete: partial-train holds only its first rows"
    assert incomplete in opened(root, "nyuv2").notes[0]
    assert not any("incomplete" in note for note in opened(root, "nyuv2", "val").notes)
