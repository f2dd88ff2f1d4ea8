"""The same experiment runs from every form, and each form says what is wrong with it."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from repmtl_ray.config import DataConfig
from repmtl_ray.data import mirrors
from repmtl_ray.data.cityscapes import CITYSCAPES
from repmtl_ray.data.sources import Stream, form_of, image_size, open_streams, tasks_of
from repmtl_ray.tasks import Depth, Normals, Segmentation
from tests.data import _forms
from tests.data._forms import (
    HEIGHT,
    WIDTH,
    frames_of,
    make_npy,
    make_official_cityscapes,
    make_parquet,
    mirrored,
    write_parquet,
)


def opened(root: Path, name: str, split: str = "train", **options) -> Stream:
    (stream,) = open_streams(DataConfig(name=name, path=str(root), **options), split)
    return stream


def assert_samples(stream: Stream, expected: list) -> None:
    assert stream.num_samples == len(expected)
    for index, arrays in enumerate(expected):
        sample = stream.load(index)
        assert list(sample) == ["sample_id", *arrays]
        for column, values in arrays.items():
            if column == "normal":  # made unit vectors once more
                np.testing.assert_allclose(sample[column], values, atol=1e-6)
            else:
                np.testing.assert_array_equal(sample[column], values, strict=True)


def refused(root: Path, name: str, message: str, *, frame: int | None = None, **options) -> None:
    """When opened, or else when the frame is loaded."""
    if frame is None:
        with pytest.raises(ValueError, match=message):
            opened(root, name, **options)
    else:
        stream = opened(root, name, **options)
        with pytest.raises(ValueError, match=message):
            stream.load(frame)


FORMS = {
    "npy": make_npy,
    "lists": make_parquet,
    "tensors": lambda root, name: make_parquet(root, name, tensors=True),
    "channels last": lambda root, name: make_parquet(root, name, channels_last=True),
    "validation": lambda root, name: make_parquet(root, name, val="validation"),
}


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_frames_that_were_stored(tmp_path, name, form):
    FORMS[form](tmp_path, name)
    data = DataConfig(name=name, path=str(tmp_path))
    assert form_of(data) == ("npy" if form == "npy" else "parquet")
    assert image_size(data) == (HEIGHT, WIDTH)
    for split in ("train", "val"):
        stream = opened(tmp_path, name, split)
        assert stream.name == name
        assert_samples(stream, frames_of(name, split))


def test_samples_are_the_same_to_the_bit_in_every_form(tmp_path):
    streams = [
        opened(make(tmp_path / name, "nyuv2"), "nyuv2", height=11, width=12)
        for name, make in FORMS.items()
    ]
    for index in range(5):
        samples = [stream.load(index) for stream in streams]
        for column, values in samples[0].items():
            assert {sample[column].tobytes() for sample in samples} == {values.tobytes()}, column


def test_nyuv2_has_three_tasks():
    assert tasks_of(DataConfig(name="nyuv2", path="/nowhere")) == (
        Segmentation(name="segmentation", num_classes=13),
        Depth(name="depth"),
        Normals(name="normal"),
    )


def test_resized_normals_are_unit_vectors_or_invalid(tmp_path):
    stream = opened(make_npy(tmp_path, "nyuv2"), "nyuv2", height=13, width=21)
    length = np.linalg.norm(stream.load(1)["normal"], axis=2)
    assert length.shape == (13, 21)
    np.testing.assert_allclose(length[length > 0], 1, atol=1e-5)
    assert (length == 0).any()


def test_a_normal_whose_components_sum_to_nothing_is_valid(tmp_path):
    root = make_npy(tmp_path, "nyuv2")
    normals = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    normals[:, :8] = np.array([1, -1, 0]) / np.sqrt(2)
    np.save(root / "train/normal/0.npy", normals)
    np.testing.assert_allclose(opened(root, "nyuv2").load(0)["normal"], normals, atol=1e-6)


def test_two_forms_in_one_folder_have_to_be_chosen_from(tmp_path):
    make_parquet(make_npy(tmp_path, "nyuv2"), "nyuv2")
    refused(tmp_path, "nyuv2", "in the forms npy and parquet; choose one with data.form")
    assert opened(tmp_path, "nyuv2", form="parquet").num_samples == 5


# NYUv2's content


def holding(root: Path, part: str, *values: float) -> Path:
    """The first numbers of training frame 2."""
    file = root / "train" / part / "2.npy"
    array = np.load(file)
    array.reshape(-1)[: len(values)] = values
    np.save(file, array)
    return root


BROKEN_FRAMES = {
    "label": ("label", (13, -1), r"train/label/2\.npy has the labels 13; expected 0 to 12, or -1"),
    "NaN depth": (
        "depth",
        (np.nan,),
        r"nyuv2: train/depth/2\.npy has 1 values that are NaN or inf",
    ),
    "negative depth": ("depth", (-0.5,), r"depth/2\.npy has negative depth, down to -0\.5"),
    "millimetres": (
        "depth",
        (2300,),
        r"depth/2\.npy has values up to 2300; expected metres, at most",
    ),
    "infinite normal": (
        "normal",
        (np.inf,),
        r"normal/2\.npy has 1 values that are NaN or infinite",
    ),
    "bytes of normals": (
        "normal",
        (255,),
        r"normal/2\.npy has values from .* to 255, expected -1 to",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FRAMES)
def test_a_broken_frame_of_nyuv2_is_named(tmp_path, case):
    part, values, message = BROKEN_FRAMES[case]
    refused(holding(make_npy(tmp_path, "nyuv2"), part, *values), "nyuv2", message, frame=2)


def test_a_frame_whose_normals_are_zero_everywhere_is_refused(tmp_path):
    root = make_npy(tmp_path, "nyuv2")
    np.save(root / "train/normal/2.npy", np.zeros((HEIGHT, WIDTH, 3), np.float32))
    message = (
        r"nyuv2: train/normal/2\.npy is zero everywhere, as if no normal were valid; expected unit"
    )
    refused(root, "nyuv2", message, frame=2)


def test_raw_disparity_is_no_inverse_depth(tmp_path):
    root = holding(make_npy(tmp_path, "cityscapes"), "depth", 9000)
    refused(root, "cityscapes", r"depth/2\.npy has values up to 9000; .* divided by 65535", frame=2)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    root = make_npy(tmp_path, "nyuv2")
    (root / "train/normal/3.npy").unlink()
    (root / "train/normal/3.npy").mkdir()
    refused(root, "nyuv2", r"nyuv2: train/normal/3\.npy cannot be read: Is a directory")


def test_a_file_without_permission_is_named(tmp_path):
    """As another user, because root may read everything."""
    root = make_npy(tmp_path, "nyuv2")
    (root / "train/depth/3.npy").chmod(0)
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from repmtl_ray.data import npy_layout, nyuv2\n"
        "if os.getuid() == 0:\n"
        "    os.setuid(65534)\n"
        "try:\n"
        "    npy_layout.open_frames(nyuv2.NYUV2, nyuv2.FOLDERS, Path(sys.argv[1]), 'train')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    for folder in (root, *root.parents):  # pytest's own are for their owner alone
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    command = [sys.executable, "-c", program, str(root)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nyuv2: train/depth/3.npy cannot be read: Permission denied." in found.stdout, found


# Parquet


def test_columns_of_other_names_are_mapped(tmp_path):
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


def test_names_of_files_may_end_in_a_digest(tmp_path):
    make_parquet(tmp_path, "nyuv2")
    for file in (tmp_path / "data").iterdir():
        file.rename(file.with_name(f"{file.stem}-0a1b2c.parquet"))
    assert_samples(opened(tmp_path, "nyuv2"), frames_of("nyuv2", "train"))


def test_rows_come_in_any_order_and_from_another_process(tmp_path):
    stream = opened(make_parquet(tmp_path, "nyuv2"), "nyuv2")
    expected = frames_of("nyuv2", "train")
    again = pickle.loads(pickle.dumps(stream))
    for index in (4, 0, 3, 3, 1, 2, 0):
        np.testing.assert_array_equal(again.load(index)["depth"], expected[index]["depth"])


def test_reading_upwards_decodes_every_row_once(tmp_path, monkeypatch):
    frames = [mirrored(_forms.cityscapes_frame(index)) for index in range(40)]
    write_parquet(tmp_path / "train.parquet", frames, rows_per_group=20)
    decoded = []
    iterate = pq.ParquetFile.iter_batches

    def counted(self, *args, **options):
        for batch in iterate(self, *args, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    stream = opened(tmp_path, "cityscapes")
    decoded.clear()
    for index in range(1, 40):
        stream.load(index)
    assert sum(decoded) <= 40 + mirrors._ROWS_AT_ONCE
    decoded.clear()
    stream.load(21)
    assert sum(decoded) <= mirrors._ROWS_AT_ONCE


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


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


def _another_row(change):
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
        lambda root: _cut(root / "data/train-00001-of-00002.parquet", 900),
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
        r"has 1 Parquet files of the split train, expected 2 as train-00000-of-00002\.parquet says",
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
                    for name, values in mirrored(_forms.cityscapes_frame(0)).items()
                }
            ],
        ),
        "train",
        None,
        r"00001-of-00002\.parquet column image is list<.*double.*, expected list<.*float.* as in data/t",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MIRRORS)
def test_a_broken_mirror_is_refused(tmp_path, case):
    spoil, split, frame, message = BROKEN_MIRRORS[case]
    spoil(make_parquet(tmp_path, "cityscapes"))
    refused(tmp_path, "cityscapes", message, frame=frame, split=split)


# Cityscapes' own files

CATEGORY_OF = (  # of the label ids 0 to 33, by hand from the authors' table
    *(-1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3),
    *(4, 4, 4, 4, 5, 5, 6, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2),
)


def test_official_cityscapes_gives_categories_and_inverse_depth(tmp_path):
    make_official_cityscapes(tmp_path)
    size = {"height": HEIGHT, "width": WIDTH}
    for split, num_frames in (("train", 4), ("val", 2)):
        stream = opened(tmp_path, "cityscapes", split, **size)
        assert stream.num_samples == num_frames
        for index in range(num_frames):
            sample, stored = stream.load(index), _forms.official_frame(index)
            np.testing.assert_array_equal(sample["image"], stored["image"])
            np.testing.assert_array_equal(
                sample["segmentation"], np.array(CATEGORY_OF)[stored["ids"]]
            )
            expected = stored["disparity"][:, :, None] / 65535
            np.testing.assert_allclose(sample["depth"], expected, rtol=1e-6)
            np.testing.assert_array_equal(
                sample["depth"] == 0, stored["disparity"][:, :, None] == 0
            )


def test_official_files_take_the_size_of_the_benchmark(tmp_path):
    make_official_cityscapes(tmp_path)
    assert image_size(DataConfig(name="cityscapes", path=str(tmp_path))) == CITYSCAPES.size
    assert opened(tmp_path, "cityscapes").load(0)["image"].shape == (128, 256, 3)


def _overwrite(part: str, pixels: np.ndarray):
    def spoil(root: Path) -> None:
        assert cv2.imwrite(str(root / part), pixels)

    return spoil


_AACHEN = "train/aachen/aachen_000001_000019_"
BROKEN_OFFICIAL = {
    "no disparity folder": (
        lambda root: shutil.rmtree(root / "disparity"),
        None,
        r"cityscapes: .* has no folder disparity/train; expected .*; .* holds gtFine, leftImg8bit",
    ),
    "no label ids": (
        lambda root: (root / f"gtFine/{_AACHEN}gtFine_labelIds.png").unlink(),
        None,
        r"gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds\.png is missing; every frame",
    ),
    "no picture": (
        lambda root: (root / f"leftImg8bit/{_AACHEN}leftImg8bit.png").unlink(),
        None,
        r"leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit\.png is missing",
    ),
    "one frame in two cities": (
        lambda root: [
            shutil.copy(file, file.parent.parent / "bochum" / file.name)
            for file in root.glob("*/train/aachen/aachen_000001*")
        ],
        None,
        "has frame aachen_000001_000019 in aachen and in bochum; a frame is one sample",
    ),
    "eight bits of disparity": (
        _overwrite(f"disparity/{_AACHEN}disparity.png", np.zeros((8, 16), np.uint8)),
        None,
        r"aachen_000001_000019_disparity\.png has pixels of 8 bits .* expected 16 bits grey",
    ),
    "colours for ids": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.zeros((8, 16, 3), np.uint8)),
        None,
        r"gtFine_labelIds\.png has pixels of 8 bits with channels \(3,\), expected 8 bits grey",
    ),
    "another size": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.zeros((4, 8), np.uint8)),
        None,
        r"000001_000019_gtFine_labelIds\.png has 4 x 8 pixels, expected 8 x 16 like gtFine/train/",
    ),
    "not a PNG": (
        lambda root: (root / f"leftImg8bit/{_AACHEN}leftImg8bit.png").write_text("<html>" * 9),
        None,
        r"aachen_000001_000019_leftImg8bit\.png is not a PNG file; copy it again",
    ),
    "cut off": (
        lambda root: _cut(root / f"leftImg8bit/{_AACHEN}leftImg8bit.png", 200),
        1,
        r"aachen_000001_000019_leftImg8bit\.png is not a complete PNG file \(200 bytes\)",
    ),
    "ids out of range": (
        _overwrite(f"gtFine/{_AACHEN}gtFine_labelIds.png", np.full((8, 16), 77, np.uint8)),
        1,
        r"gtFine_labelIds\.png has the label ids 77; expected 0 to 33 \(labelIds, neither trainIds",
    ),
}


@pytest.mark.parametrize("case", BROKEN_OFFICIAL)
def test_broken_official_files_are_named(tmp_path, case):
    spoil, frame, message = BROKEN_OFFICIAL[case]
    spoil(make_official_cityscapes(tmp_path))
    refused(tmp_path, "cityscapes", message, frame=frame)


def test_official_cityscapes_has_no_test_split(tmp_path):
    message = "labels of the official test split are not public"
    refused(make_official_cityscapes(tmp_path), "cityscapes", message, split="test")
