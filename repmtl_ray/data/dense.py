"""Images with a target for every pixel, in whatever form they are stored: their checks and sizes.

Owns what Cityscapes and NYUv2 have in common. A form (`npy_layout`, `mirrors`, `cityscapes_files`,
`nyuv2_mat`) hands over stored arrays as `Frames`; from there on, all forms are the same. What
listings and headers show is checked when a split is opened, what is in a frame when it is loaded.
Images are not normalised, as in the published experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data import contract
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.stream import Kind, Sample, Stream

Shape = tuple[int, ...]

_IMAGE_TOLERANCE = 1e-3
"""How far resampling may have carried a float image out of 0..1."""
_NORMAL_TOLERANCE = 0.01
_LENGTH_TOLERANCE = 0.1
_MAX_SHARE_LONG = 0.01
"""Of the normals: resampling makes those between two surfaces short, and none long."""
_MAX_SHARE_OFF = 0.5
_SHORTEST_NORMAL = 1e-3
"""Of a stored normal; below, it is invalid. Resampling leaves those between two surfaces short."""
_FARTHEST: Mapping[Kind, tuple[float, str]] = {
    "depth": (100.0, "metres, at most 100 (millimetres divided by 1000)"),
    "inverse_depth": (1.0, "inverse depth, at most 1 (the 16-bit disparity divided by 65535)"),
}


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
            label = f"{self.dense.name}: {self.frames.where(index, column)}"
            checked = self._checked(_upright(values, kind, self.stored), kind, label)
            if self.size != self.stored:
                checked = _resized(checked, kind, self.size)
            sample[column] = checked[:, :, None] if kind in _FARTHEST else checked
        return sample

    def _checked(self, values: NDArray[Any], kind: Kind, label: str) -> NDArray[Any]:
        if kind == "image":
            return _image(values, label)
        if kind == "label":
            return _labels(values, label, self.dense.num_classes)
        return _normals(values, label) if kind == "normal" else _depth(values, label, kind)


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
    found: Shape,
    size: tuple[int, int],
    frame: int = 0,
) -> None:
    accepted = _accepted(kind, size)
    if found in accepted:
        return
    expected = " or ".join(map(str, accepted))
    raise ValueError(
        f"{dense.name}: {frames.where(frame, column)} has shape {found}, expected {expected} like "
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
    valid = length > _SHORTEST_NORMAL
    unit = np.divide(normals, length, out=np.zeros_like(normals), where=valid)
    return np.ascontiguousarray(unit, dtype=np.float32)


def _image(values: NDArray[Any], label: str) -> NDArray[Any]:
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= -_IMAGE_TOLERANCE and high <= 1 + _IMAGE_TOLERANCE):  # NaN fails too
            raise ValueError(
                f"{label} has values from {low:g} to {high:g}, expected 0 to 1 in a file of "
                "floats; divide by 255, or save 0..255 as uint8."
            )
        return np.ascontiguousarray(values, dtype=np.float32)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"{label} has values from {low} to {high}, expected 0 to 255 in a file of integers."
        )
    return np.ascontiguousarray(values, dtype=np.uint8)


def _labels(values: NDArray[Any], label: str, num_classes: int) -> NDArray[Any]:
    low, high = values.min(), values.max()
    integral = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    if integral and low >= IGNORE_LABEL and high < num_classes:  # NaN is not integral
        return np.ascontiguousarray(values, dtype=np.int16)
    strange = [value for value in np.unique(values).tolist() if value not in range(-1, num_classes)]
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    hint = " (if 255 means ignore, save it as -1)" if 255 in strange else ""
    raise ValueError(
        f"{label} has the labels {', '.join(f'{value:g}' for value in strange[:8])}{more}; "
        f"expected 0 to {num_classes - 1}, or {IGNORE_LABEL} to ignore{hint}; re-run the "
        "preparation."
    )


def _depth(values: NDArray[Any], label: str, kind: Kind) -> NDArray[Any]:
    low, high = values.min(), values.max()
    farthest, unit = _FARTHEST[kind]
    if low >= 0 and high <= farthest:  # both are NaN if any value is
        return np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        found = f"has {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite"
    elif low < 0:
        found = f"has negative {kind.replace('_', ' ')}, down to {low:g}"
    else:
        raise ValueError(f"{label} has values up to {high:g}; expected {unit}; 0 where invalid.")
    raise ValueError(
        f"{label} {found}; expected finite values from 0 on, 0 where invalid; re-run the "
        "preparation."
    )


def _normals(values: NDArray[Any], label: str) -> NDArray[Any]:
    expected = "expected unit vectors, zero where invalid; re-run the preparation."
    if not np.isfinite(values).all():
        number = np.count_nonzero(~np.isfinite(values))
        raise ValueError(f"{label} has {number} values that are NaN or infinite; {expected}")
    stored = np.ascontiguousarray(values, dtype=np.float32)
    low, high = stored.min(), stored.max()
    if max(-low, high) > 1 + _NORMAL_TOLERANCE:
        raise ValueError(
            f"{label} has values from {low:g} to {high:g}, expected -1 to 1. {contract.COLOURS}"
        )
    if values.dtype.kind != "f":
        raise ValueError(f"{label} has dtype {values.dtype}, which rounds unit vectors; {expected}")
    length = np.linalg.norm(stored, axis=2)
    length = length[length > _SHORTEST_NORMAL]
    too_long = np.count_nonzero(length > 1 + _LENGTH_TOLERANCE)
    off = too_long + np.count_nonzero(length < 1 - _LENGTH_TOLERANCE)
    if too_long > _MAX_SHARE_LONG * length.size or off > _MAX_SHARE_OFF * length.size:
        raise ValueError(
            f"{label} has {off} of {length.size} vectors whose length is not 1 (from "
            f"{length.min():g} to {length.max():g}), {expected} {contract.COLOURS}"
        )
    normals = _unit(stored)
    if not normals.any():
        raise ValueError(f"{label} is zero everywhere, as if no normal were valid; {expected}")
    return normals
