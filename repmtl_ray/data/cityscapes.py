"""Cityscapes in the community's npy layout: 7 classes and inverse depth at every pixel.

Owns the layout and the checks of its content:

    {train,val}/image/<i>.npy           [H, W, 3] or [3, H, W]; floats in 0..1 or integers in 0..255
    {train,val}/{label_7,label}/<i>.npy [H, W]; 0 to 6, -1 to ignore
    {train,val}/depth/<i>.npy           [H, W, 1], [1, H, W] or [H, W]; inverse depth, invalid 0

What folder listings and headers show is checked when a split is opened, what is in a frame when the
frame is loaded. Images are not normalised, as in the published experiments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.npy import Header, NpyFolder, listing, read_header
from repmtl_ray.data.stream import Sample, Stream

NUM_CLASSES = 7
SEGMENTATION = "segmentation"
DEPTH = "depth"

_LAYOUT = "{train,val}/{image, label_7 or label, depth}/<i>.npy"
_RANGE_TOLERANCE = 1e-3
"""How far resampling may have carried a float image out of 0..1."""


def open_split(root: Path, split: str, *, size: tuple[int, int] | None) -> Stream:
    """One split of a folder, its listings and headers checked.

    Args:
        root: folder that holds `train` and `val`.
        split: "train", "val" or "test" (if someone made one).
        size: (height, width) of the samples; None keeps the stored one. Images are resized
            bilinearly, labels and depth to the nearest pixel.

    Raises:
        ValueError: not this layout, an empty split, a gap, a file that cannot be used, shapes that
            disagree; says which file, what was found and what to do.
    """
    image, label, depth = _folders(root, split)
    num_frames = image.num_frames()
    for folder in (label, depth):
        found = folder.num_frames()
        if found != num_frames:
            raise ValueError(
                f"cityscapes: {folder.part} has {found} frames, {image.part} has {num_frames}; "
                "every frame needs an image, a label and a depth: restore the missing ones from "
                f"frame {min(found, num_frames)} on, or remove the others."
            )
    height, width = _image_size(image, image.common_header(num_frames))
    for folder, channels in ((label, False), (depth, True)):
        shape = folder.common_header(num_frames).shape
        accepted = _plane_shapes(height, width, channels=channels)
        if shape not in accepted:
            expected = " or ".join(map(str, accepted))
            raise ValueError(
                f"{folder.label(0)} has shape {shape}, expected {expected} like {image.part}; "
                "re-run the preparation with one size for all three."
            )
    size = (height, width) if size is None else size
    return Stream(
        name="cityscapes",
        kinds={SEGMENTATION: "label", DEPTH: "inverse_depth"},
        num_samples=num_frames,
        load=_Loader(image, label, depth, (height, width), size),
    )


def stored_size(root: Path) -> tuple[int, int]:
    """(height, width) of the first training image.

    Raises:
        ValueError: not this layout, or that file cannot be used.
    """
    image, _, _ = _folders(root, "train")
    return _image_size(image, read_header(image.file(0), image.label(0)))


@dataclass(frozen=True)
class _Loader:
    image: NpyFolder
    label: NpyFolder
    depth: NpyFolder
    stored: tuple[int, int]
    size: tuple[int, int]

    def __call__(self, index: int) -> Sample:
        image = _image(self.image.load(index), self.image.label(index))
        label = _label(self.label.load(index).reshape(self.stored), self.label.label(index))
        depth = _depth(self.depth.load(index).reshape(self.stored), self.depth.label(index))
        if self.size != self.stored:
            across = self.size[::-1]  # OpenCV wants (width, height)
            image = cv2.resize(image, across, interpolation=cv2.INTER_LINEAR)
            label, depth = (
                cv2.resize(plane, across, interpolation=cv2.INTER_NEAREST_EXACT)
                for plane in (label, depth)
            )
        return {
            SAMPLE_ID: np.array(index, dtype=np.int64),
            IMAGE: image,
            SEGMENTATION: label,
            DEPTH: depth[:, :, None],
        }


def _folders(root: Path, split: str) -> tuple[NpyFolder, NpyFolder, NpyFolder]:
    """The folders of images, labels and depths, which exist."""
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"cityscapes: {root} {found}; expected a folder with {_LAYOUT}. Set data.path to it, "
            "or to None for rendered street scenes."
        )
    if split == "test" and not (root / "test").is_dir():
        raise ValueError(
            f"cityscapes: {root} has no test split (the labels of Cityscapes' own are not public); "
            "evaluate on the split 'val'."
        )
    label_folder = "label_7" if (root / split / "label_7").is_dir() else "label"
    for folder in ("image", label_folder, "depth"):
        if (root / split / folder).is_dir():
            continue
        name = "label_7 (or label)" if folder == "label" else folder
        where = root / split if (root / split).is_dir() else root
        holds = listing([path.name for path in where.iterdir()])
        raise ValueError(
            f"cityscapes: {root} has no folder {split}/{name}; expected {_LAYOUT}; {where} holds "
            f"{holds}.{_nearby(root, split)}"
        )
    image, label, depth = (
        NpyFolder("cityscapes", root, f"{split}/{part}")
        for part in ("image", label_folder, "depth")
    )
    return image, label, depth


def _nearby(root: Path, split: str) -> str:
    """A hint, if the data set is one folder up or down."""
    inside = [path for path in sorted(root.iterdir()) if (path / split / "image").is_dir()]
    for path in [*inside, root.parent]:
        if (path / split / "image").is_dir():
            return f" Did you mean {path}?"
    return ""


def _image_size(folder: NpyFolder, header: Header) -> tuple[int, int]:
    shape = header.shape
    if len(shape) == 3 and shape[2] == 3:
        return shape[0], shape[1]
    if len(shape) == 3 and shape[0] == 3:
        return shape[1], shape[2]
    raise ValueError(
        f"{folder.label(0)} has shape {shape}, expected (height, width, 3) or (3, height, width)."
    )


def _plane_shapes(height: int, width: int, *, channels: bool) -> list[tuple[int, ...]]:
    plain: list[tuple[int, ...]] = [(height, width)]
    with_channel: list[tuple[int, ...]] = [(height, width, 1), (1, height, width)]
    return with_channel + plain if channels else plain + with_channel


def _image(values: NDArray[Any], label: str) -> NDArray[Any]:
    if values.shape[2] != 3:
        values = np.moveaxis(values, 0, 2)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):  # NaN fails too
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


def _label(values: NDArray[Any], label: str) -> NDArray[Any]:
    low, high = values.min(), values.max()
    integral = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    if integral and low >= IGNORE_LABEL and high < NUM_CLASSES:  # NaN is not integral
        return np.ascontiguousarray(values, dtype=np.int16)
    strange = [value for value in np.unique(values).tolist() if value not in range(-1, NUM_CLASSES)]
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    hint = " (if 255 means ignore, save it as -1)" if 255 in strange else ""
    raise ValueError(
        f"{label} has the labels {', '.join(f'{value:g}' for value in strange[:8])}{more}; "
        f"expected 0 to {NUM_CLASSES - 1}, or {IGNORE_LABEL} to ignore{hint}; re-run the "
        "preparation."
    )


def _depth(values: NDArray[Any], label: str) -> NDArray[Any]:
    low, high = values.min(), values.max()
    if low >= 0 and np.isfinite(high):  # both are NaN if any value is
        return np.ascontiguousarray(values, dtype=np.float32)
    if np.isfinite(values).all():
        found = f"has negative inverse depth, down to {low:g}"
    else:
        found = f"has {np.count_nonzero(~np.isfinite(values))} values that are NaN or infinite"
    raise ValueError(
        f"{label} {found}; expected finite values from 0 on, 0 where invalid; re-run the "
        "preparation."
    )
