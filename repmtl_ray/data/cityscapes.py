"""Cityscapes: 7 classes and inverse depth at every pixel.

Owns what the data set is, its npy layout, and the PNG files of 1024 x 2048 pixels that its authors hand
out:

    {train,val}/image/<i>.npy           [H, W, 3] or [3, H, W]; floats in 0..1 or integers in 0..255
    {train,val}/{label_7,label}/<i>.npy [H, W]; 0 to 6, -1 to ignore
    {train,val}/depth/<i>.npy           [H, W, 1], [1, H, W] or [H, W]; inverse depth, invalid 0

    leftImg8bit/{train,val}/<city>/<frame>_leftImg8bit.png    8-bit RGB
    gtFine/{train,val}/<city>/<frame>_gtFine_labelIds.png     ids 0 to 33 -> 7 categories, void -> -1
    disparity/{train,val}/<city>/<frame>_disparity.png        16 bits -> inverse depth

Inverse depth is the stored number / 65535, as the npy layout has it, and 0 where nothing was
measured. Frames of PNG files are numbered in the order of their names; the npy layout's order was
never published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE
from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.files import compare_splits, listing, visible, visible_below
from repmtl_ray.data.npy import Folders
from repmtl_ray.data.stream import MissingSplitError

NUM_CLASSES = 7
SEGMENTATION = "segmentation"
DEPTH = "depth"

CITYSCAPES = DenseSet(
    name="cityscapes",
    num_classes=NUM_CLASSES,
    targets={SEGMENTATION: "label", DEPTH: "inverse_depth"},
    size=(128, 256),
)
FOLDERS: Folders = {IMAGE: ("image",), SEGMENTATION: ("label_7", "label"), DEPTH: ("depth",)}


MAX_DISPARITY = 65535

_CATEGORIES = {  # the ids of each, in the order of the 7 classes
    "flat": (7, 8, 9, 10),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 29, 30, 31, 32, 33),
    "construction": (11, 12, 13, 14, 15, 16),
    "object": (17, 18, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
}
_VOID = (0, 1, 2, 3, 4, 5, 6, 255)  # 255 is -1, licence plate, in 8 bits


class _Part(NamedTuple):
    """Where one column's files are, and the pixels that they should have."""

    folder: str
    suffix: str
    channels: int
    bits: int


_PARTS = {
    IMAGE: _Part("leftImg8bit", "_leftImg8bit.png", 3, 8),
    SEGMENTATION: _Part("gtFine", "_gtFine_labelIds.png", 1, 8),
    DEPTH: _Part("disparity", "_disparity.png", 1, 16),
}
_CHANNELS = {0: 1, 2: 3}  # of PNG's colour types that are used here
_UNKNOWN = -2


@dataclass(frozen=True)
class PngFrames:
    """One split; `Frames` of `dense`."""

    root: Path
    split: str
    names: tuple[str, ...]
    """`<city>/<frame>`"""
    shapes: Mapping[str, Shape]
    notes: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        return len(self.names)

    def where(self, frame: int, column: str) -> str:
        part = _PARTS[column]
        return f"{part.folder}/{self.split}/{self.names[frame]}{part.suffix}"

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        image, ids, disparity = (self._pixels(frame, column) for column in _PARTS)
        labels = _LABEL_OF[ids]
        if (labels == _UNKNOWN).any():
            strange = np.unique(ids[labels == _UNKNOWN]).tolist()
            raise ValueError(
                f"cityscapes: {self.where(frame, SEGMENTATION)} has the label ids "
                f"{', '.join(map(str, strange[:8]))}; expected 0 to 33 (labelIds, neither trainIds "
                "nor colours)."
            )
        inverse = disparity.astype(np.float32) / np.float32(MAX_DISPARITY)
        return {IMAGE: image[:, :, ::-1], SEGMENTATION: labels, DEPTH: inverse}

    def _pixels(self, frame: int, column: str) -> NDArray[Any]:
        where, part = self.where(frame, column), _PARTS[column]
        try:
            data = np.fromfile(self.root / where, dtype=np.uint8)
        except OSError as error:
            raise ValueError(f"cityscapes: {where} cannot be read: {error.strerror}.") from error
        # OpenCV fills up what is missing of a cut file with nothing but a line on stderr.
        complete = data[-12:-4].tobytes().endswith(b"IEND")
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if complete else None
        if pixels is None:
            raise ValueError(
                f"cityscapes: {where} is not a complete PNG file ({len(data)} bytes); copy it again."
            )
        expected = np.dtype(f"u{part.bits // 8}")
        if pixels.dtype != expected or pixels.ndim != (3 if part.channels == 3 else 2):
            raise ValueError(_wrong_pixels(where, pixels.dtype, pixels.shape[2:], part))
        return pixels


def open_frames(root: Path, split: str) -> PngFrames:
    """One split, its listing and its files' headers checked.

    Args:
        root: folder that holds leftImg8bit, gtFine and disparity.
        split: "train" or "val".

    Raises:
        ValueError: a missing folder or file, an empty split, a frame in two cities or splits, a file that is
            not PNG or of another kind or size.
    """
    if split == "test":
        raise MissingSplitError(
            "cityscapes: the labels of the official test split are not public; evaluate on 'val'."
        )
    files = {column: _names(root, split, part) for column, part in _PARTS.items()}
    names = files[IMAGE]
    for column, part in _PARTS.items():
        for name in sorted(set(names) ^ set(files[column])):
            other = part if name in names else _PARTS[IMAGE]
            raise ValueError(
                f"cityscapes: {other.folder}/{split}/{name}{other.suffix} is missing; every frame "
                "needs a picture, label ids and a disparity: restore it, or remove the frame's "
                "other files."
            )
    cities: dict[str, str] = {}
    for name in names:
        city, _, frame = name.partition("/")
        if cities.setdefault(frame, city) != city:
            raise ValueError(
                f"cityscapes: leftImg8bit/{split} has frame {frame} in {cities[frame]} and in "
                f"{city}; a frame is one sample: remove one of the two."
            )
    notes = _split_notes(root)
    return PngFrames(root, split, tuple(names), _shapes(root, split, names), notes)


def is_official(root: Path) -> bool:
    """Whether a folder looks like the official files."""
    return any((root / part.folder).is_dir() for part in _PARTS.values())


def _names(root: Path, split: str, part: _Part) -> list[str]:
    folder = root / part.folder / split
    if not folder.is_dir():
        where = next(path for path in (folder.parent, root, root.parent) if path.is_dir())
        holds = listing(path.name for path in visible(where))
        raise ValueError(
            f"cityscapes: {root} has no folder {part.folder}/{split}; expected leftImg8bit, gtFine "
            f"and disparity, each with {split}/<city>/<frame>_....png; {where} holds {holds}."
        )
    paths = visible_below(folder, f"*/*{part.suffix}")
    if not paths:
        holds = listing(path.name for path in visible(folder))
        raise ValueError(
            f"cityscapes: {part.folder}/{split} has no <city>/<frame>{part.suffix}; it holds "
            f"{holds}."
        )
    return [f"{path.parent.name}/{path.name.removesuffix(part.suffix)}" for path in paths]


def _split_notes(root: Path) -> tuple[str, ...]:
    """What has to be said of pictures that both splits have.

    Raises:
        ValueError: a frame with one name in both, or one file under two names.
    """
    part = _PARTS[IMAGE]
    pictures = {
        split: visible_below(root / part.folder / split, f"*/*{part.suffix}")
        for split in ("train", "val")
    }
    train = {path.name: path for path in pictures["train"]}
    for path in pictures["val"]:
        if path.name in train:
            raise ValueError(
                f"cityscapes: {path.relative_to(root)} and {train[path.name].relative_to(root)} are "
                "one frame; a frame is in one split: remove it from one of the two."
            )
    files = {
        split: [path.relative_to(root).as_posix() for path in paths]
        for split, paths in pictures.items()
    }
    return compare_splits("cityscapes", root, files)


def _shapes(root: Path, split: str, names: list[str]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for column, part in _PARTS.items():
        for name in names:
            where = f"{part.folder}/{split}/{name}{part.suffix}"
            shape = _header(root / where, where, part)
            first = shapes.setdefault(column, shape)
            if shape != first:
                raise ValueError(
                    f"cityscapes: {where} has {shape[0]} x {shape[1]} pixels, expected {first[0]} x "
                    f"{first[1]} like {part.folder}/{split}/{names[0]}{part.suffix}."
                )
    return shapes


def _header(path: Path, where: str, part: _Part) -> Shape:
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise ValueError(f"cityscapes: {where} cannot be read: {error.strerror}.") from error
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"cityscapes: {where} is not a PNG file; copy it again.")
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    bits, channels = head[24], _CHANNELS.get(head[25], 0)
    if (bits, channels) != (part.bits, part.channels):
        raise ValueError(_wrong_pixels(where, f"{bits} bits", (channels or "other",), part))
    return (height, width, 3) if channels == 3 else (height, width)


def _wrong_pixels(where: str, kind: object, channels: object, part: _Part) -> str:
    colour = "RGB" if part.channels == 3 else "grey"
    return (
        f"cityscapes: {where} has pixels of {kind} with channels {channels}, expected {part.bits} "
        f"bits {colour}; take the file {part.suffix} of {part.folder}."
    )


def _label_table() -> NDArray[np.int16]:
    table = np.full(256, _UNKNOWN, dtype=np.int16)
    table[list(_VOID)] = IGNORE_LABEL
    for label, ids in enumerate(_CATEGORIES.values()):
        table[list(ids)] = label
    return table


_LABEL_OF = _label_table()
assert len(_CATEGORIES) == CITYSCAPES.num_classes
