"""NYUv2 and Cityscapes on disk in the forms that people have them, made of the same frames; how tests
open, compare and spoil them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io

from repmtl_ray.config import DataConfig
from repmtl_ray.data.sources import Sample, Stream, open_streams
from tests.helpers import layouts

HEIGHT, WIDTH = 8, 16


def nyuv2_frame(index: int, *, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Sample:
    rng = np.random.default_rng([seed, index, 3])
    depth = rng.uniform(0.5, 9.0, (height, width, 1)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.2] = 0
    normal = rng.standard_normal((height, width, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    normal[rng.random((height, width)) < 0.2] = 0
    return {
        "image": rng.random((height, width, 3), dtype=np.float32),
        "segmentation": rng.integers(-1, 13, (height, width)).astype(np.int16),
        "depth": depth,
        "normal": normal,
    }


def cityscapes_frame(index: int, *, seed: int = 0) -> Sample:
    arrays = layouts.frame(index, height=HEIGHT, width=WIDTH, seed=seed)
    return {
        "image": arrays["image"],
        "segmentation": arrays["label"],
        "depth": arrays["depth"],
    }


FRAMES = {"nyuv2": nyuv2_frame, "cityscapes": cityscapes_frame}
SPLITS = {"train": (5, 1), "val": (3, 2)}
"""How many frames, and the seed of each."""


def frames_of(name: str, split: str) -> list[Sample]:
    num_frames, seed = SPLITS[split]
    return [FRAMES[name](index, seed=seed) for index in range(num_frames)]


Change = Callable[[Sample], Sample]
"""Of a frame before it is stored."""


def unchanged(arrays: Sample) -> Sample:
    return arrays


def make_npy(root: Path, name: str, *, labels: str = "label", change: Change = unchanged) -> Path:
    for split in SPLITS:
        for index, arrays in enumerate(frames_of(name, split)):
            for column, values in change(arrays).items():
                folder = root / split / (labels if column == "segmentation" else column)
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{index}.npy", values)
    return root


def mirrored(arrays: Sample) -> dict[str, Any]:
    """A frame as the published mirrors have it: channels first, int64 labels, one more column."""
    row = {
        column: np.moveaxis(values, 2, 0) if values.ndim == 3 else values.astype(np.int64)
        for column, values in arrays.items()
    }
    return {**row, "noise": np.ones((1, HEIGHT, WIDTH), np.float32)}


def write_parquet(
    path: Path, rows: list[dict[str, Any]], *, tensors: bool = False, rows_per_group: int = 2
) -> None:
    columns: dict[str, pa.Array] = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        if tensors:
            columns[name] = pa.FixedShapeTensorArray.from_numpy_ndarray(
                np.ascontiguousarray(values)
            )
        else:
            columns[name] = pa.array(values.tolist(), type=_lists(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)


def _lists(values: np.ndarray) -> pa.DataType:
    kind: pa.DataType = pa.from_numpy_dtype(values.dtype)
    for _ in range(values.ndim - 1):
        kind = pa.list_(kind)
    return kind


def make_parquet(
    root: Path,
    name: str,
    *,
    rename: Mapping[str, str] | None = None,
    val: str = "val",
    tensors: bool = False,
    channels_last: bool = False,
    change: Change = unchanged,
) -> Path:
    """Two files of training rows and one of validation rows, as hubs name them."""
    for split in SPLITS:
        rows = [
            {(rename or {}).get(column, column): values for column, values in row.items()}
            for row in (
                dict(arrays) if channels_last else mirrored(arrays)
                for arrays in map(change, frames_of(name, split))
            )
        ]
        parts = [rows[:3], rows[3:]] if split == "train" else [rows]
        for number, part in enumerate(parts):
            file = f"{val if split == 'val' else split}-{number:05}-of-{len(parts):05}.parquet"
            write_parquet(root / "data" / file, part, tensors=tensors)
    return root


# The official file of NYUv2

NAMES = [f"label {number}" for number in range(1, 895)]
TO_FORTY = [1 + number % 40 for number in range(894)]
TO_THIRTEEN = [1 + number % 13 for number in range(40)]
MAT_TRAIN, MAT_VAL = (1, 4), (2, 3, 5)


def mat_frame(index: int, *, height: int = 24, width: int = 32) -> Sample:
    """As an array should come out: a wall that is one plane, and a picture of many colours."""
    rng = np.random.default_rng([index, 5])
    return {
        "image": rng.integers(0, 256, (height, width, 3)).astype(np.uint8),
        "depth": np.full((height, width), 2.0 + index, np.float32),
        "label": rng.integers(0, 895, (height, width)).astype(np.uint16),
    }


def make_mat(root: Path, *, num_frames: int = 5) -> Path:
    """The four official files: axes reversed, names behind references, frames numbered from 1."""
    root.mkdir(parents=True, exist_ok=True)
    frames = [mat_frame(index) for index in range(num_frames)]
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, column in (("images", "image"), ("depths", "depth"), ("labels", "label")):
            stored = np.stack([frame[column].T for frame in frames])
            file.create_dataset(name, data=stored, chunks=(1, *stored.shape[1:]), compression=3)
        references = np.empty((1, len(NAMES)), dtype=h5py.ref_dtype)
        for number, name in enumerate(NAMES):
            text = np.array([[ord(letter)] for letter in name], dtype=np.uint16)
            references[0, number] = file.create_dataset(f"#refs#/{number}", data=text).ref
        file.create_dataset("names", data=references, dtype=h5py.ref_dtype)
    with (root / "nyu_depth_v2_labeled.mat").open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    numbers = {"trainNdxs": np.array(MAT_TRAIN)[:, None], "testNdxs": np.array(MAT_VAL)[:, None]}
    scipy.io.savemat(root / "splits.mat", numbers)
    scipy.io.savemat(root / "classMapping40.mat", {"mapClass": np.array([TO_FORTY])})
    names = np.array([f"class {number}" for number in range(13)], dtype=object)
    thirteen = {"classMapping13": {"labels13": np.array([TO_THIRTEEN]), "className": names}}
    scipy.io.savemat(root / "class13Mapping.mat", thirteen)
    return root


# The official files of Cityscapes

CITIES = {"train": ("aachen", "bochum"), "val": ("ulm",)}


def official_frame(seed: int) -> Sample:
    """The pixels of the three files of a frame; the picture is RGB."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8),
        "ids": rng.integers(0, 34, (HEIGHT, WIDTH)).astype(np.uint8),
        "disparity": rng.integers(0, 32257, (HEIGHT, WIDTH)).astype(np.uint16),
    }


def make_official_cityscapes(root: Path) -> Path:
    """Two frames a city; frame number n of a split has the pixels of `official_frame(n)`."""
    for split, cities in CITIES.items():
        for number, city in enumerate(cities):
            for index in range(2):
                name = f"{city}_{index:06}_000019"
                arrays = official_frame(2 * number + index)
                for folder, suffix, pixels in (
                    ("leftImg8bit", "leftImg8bit", arrays["image"][:, :, ::-1]),
                    ("gtFine", "gtFine_labelIds", arrays["ids"]),
                    ("disparity", "disparity", arrays["disparity"]),
                ):
                    file = root / folder / split / city / f"{name}_{suffix}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    assert cv2.imwrite(str(file), pixels)
    return root


def opened(root: Path, name: str, split: str = "train", **options: Any) -> Stream:
    """The one stream of a split."""
    (stream,) = open_streams(DataConfig(name=name, path=str(root), **options), split)
    return stream


def assert_samples(stream: Stream, expected: list) -> None:
    """The same columns, in their order, and values."""
    assert stream.num_samples == len(expected)
    for index, arrays in enumerate(expected):
        sample = stream.load(index)
        assert list(sample) == ["sample_id", *arrays]
        for column, values in arrays.items():
            if column == "normal":  # made unit vectors once more
                np.testing.assert_allclose(sample[column], values, atol=1e-6)
            else:
                np.testing.assert_array_equal(sample[column], values, strict=True)


def refused(
    root: Path, name: str, message: str, *, frame: int | None = None, **options: Any
) -> None:
    """When opened, or else when the frame is loaded."""
    if frame is None:
        with pytest.raises(ValueError, match=message):
            opened(root, name, **options)
    else:
        stream = opened(root, name, **options)
        with pytest.raises(ValueError, match=message):
            stream.load(frame)


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
