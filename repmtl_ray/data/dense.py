"""Images with a target for every pixel, in whatever form they are stored: their shapes and sizes.

Owns what Cityscapes and NYUv2 have in common. A form (`npy`, `parquet_files`, or the official files in
`cityscapes` and `nyuv2`) hands over stored arrays as `Frames`; from there on, all forms are the same.
What listings and headers show is checked when a split is opened, what is in a frame when it is loaded
(`validation`). Images are not normalised, as in the published experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.stream import Kind, Sample, Stream
from repmtl_ray.data.validation import SHORTEST_NORMAL, content_problems

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DenseSet:
    """A data set whose targets are for every pixel.

    Args:
        name: begins every error message; also the name of its stream.
        num_classes: of its labels.
        targets: their kinds, by task, in order.
        size: (height, width) of the benchmark.
    """

    name: str
    num_classes: int
    targets: Mapping[str, Kind]
    size: tuple[int, int]

    @property
    def columns(self) -> tuple[str, ...]:
        return (IMAGE, *self.targets)


class Frames(Protocol):
    """The stored arrays of one split; picklable."""

    @property
    def num_frames(self) -> int: ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Of the first frame, by column."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """As of `Stream`."""
        ...

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        """One frame's numbers by column, [H, W] with channels before, behind or without.

        Raises:
            ValueError: they cannot be read.
        """
        ...

    def where(self, frame: int, column: str) -> str:
        """How error messages call this array."""
        ...


def open_stream(dense: DenseSet, frames: Frames, *, size: tuple[int, int] | None = None) -> Stream:
    """The stream of a split.

    Args:
        dense: what the frames are of.
        frames: at least one.
        size: (height, width) of the samples; None keeps the stored one. Images and normals are
            resized bilinearly (averaged, where they shrink to half or less), labels and depth to
            the nearest pixel.

    Raises:
        ValueError: shapes that disagree; says where, what was found and what was expected.
    """
    stored = image_size(dense, frames)
    for column, kind in dense.targets.items():
        _check_shape(dense, frames, column, kind, frames.shapes[column], stored)
    return Stream(
        name=dense.name,
        kinds=dict(dense.targets),
        num_samples=frames.num_frames,
        load=_Loader(dense, frames, stored, stored if size is None else size),
        notes=frames.notes,
        image_size=stored if size is None else size,
    )


def image_size(dense: DenseSet, frames: Frames) -> tuple[int, int]:
    """(height, width) of the stored images.

    Raises:
        ValueError: they have no three channels.
    """
    shape = frames.shapes[IMAGE]
    if len(shape) == 3 and shape[2] == 3:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] == 3:
        return shape[1], shape[2]
    raise ValueError(
        f"{dense.name}: {frames.where(0, IMAGE)} has shape {shape}, expected (height, width, 3) or "
        "(3, height, width)."
    )


@dataclass(frozen=True)
class _Loader:
    dense: DenseSet
    frames: Frames
    stored: tuple[int, int]
    size: tuple[int, int]

    def __call__(self, index: int) -> Sample:
        arrays = self.frames.read(index)
        kinds: dict[str, Kind] = {IMAGE: "image", **self.dense.targets}
        sample: Sample = {SAMPLE_ID: np.array(index, dtype=np.int64)}
        for column, kind in kinds.items():
            values = arrays[column]
            _check_shape(self.dense, self.frames, column, kind, values.shape, self.stored, index)
            values = _upright(values, kind, self.stored)
            for problem in content_problems(
                values, kind, num_classes=self.dense.num_classes, is_stored=True
            ):
                where = f"{self.dense.name}: {self.frames.where(index, column)}"
                raise ValueError(f"{where} {problem}; re-run the preparation.")
            converted = _converted(values, kind)
            if self.size != self.stored:
                converted = _resized(converted, kind, self.size)
            has_channel = kind in ("depth", "inverse_depth")
            sample[column] = converted[:, :, None] if has_channel else converted
        return sample


def _accepted(kind: Kind, size: tuple[int, int]) -> list[Shape]:
    if kind in ("image", "normal"):
        return [(*size, 3), (3, *size)]
    plain: Shape = size
    return [plain, (*size, 1), (1, *size)] if kind == "label" else [(*size, 1), (1, *size), plain]


def _check_shape(
    dense: DenseSet,
    frames: Frames,
    column: str,
    kind: Kind,
    shape: Shape,
    size: tuple[int, int],
    frame: int = 0,
) -> None:
    accepted = _accepted(kind, size)
    if shape in accepted:
        return
    expected = " or ".join(map(str, accepted))
    raise ValueError(
        f"{dense.name}: {frames.where(frame, column)} has shape {shape}, expected {expected} like "
        f"{frames.where(0, IMAGE)}; re-run the preparation with one size for all."
    )


def _upright(values: NDArray[Any], kind: Kind, size: tuple[int, int]) -> NDArray[Any]:
    """[H, W, 3] or [H, W]."""
    if kind not in ("image", "normal"):
        return values.reshape(size)
    return values if values.shape == (*size, 3) else np.moveaxis(values, 0, 2)


def _resized(values: NDArray[Any], kind: Kind, size: tuple[int, int]) -> NDArray[Any]:
    across = size[::-1]  # OpenCV wants (width, height)
    if kind not in ("image", "normal"):
        return cv2.resize(values, across, interpolation=cv2.INTER_NEAREST_EXACT)
    halves = all(2 * new <= old for new, old in zip(size, values.shape[:2], strict=True))
    how = cv2.INTER_AREA if halves else cv2.INTER_LINEAR
    resized = cv2.resize(values, across, interpolation=how)
    if kind == "image":
        return resized
    stored = np.asarray(values.any(axis=2), dtype=np.uint8)
    valid = cv2.resize(stored, across, interpolation=cv2.INTER_NEAREST_EXACT)
    return _unit(resized * valid[:, :, None])


def _unit(normals: NDArray[Any]) -> NDArray[np.float32]:
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    valid = length > SHORTEST_NORMAL
    unit = np.divide(normals, length, out=np.zeros_like(normals), where=valid)
    return np.ascontiguousarray(unit, dtype=np.float32)


def _converted(values: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Stored values without a problem, in the dtype of a sample."""
    if kind == "label":
        return np.ascontiguousarray(values, dtype=np.int16)
    if kind == "image" and values.dtype.kind != "f":
        return np.ascontiguousarray(values, dtype=np.uint8)
    stored = np.ascontiguousarray(values, dtype=np.float32)
    return _unit(stored) if kind == "normal" else stored
