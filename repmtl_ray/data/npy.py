"""Dense data in folders of numbered npy files, the community's layout.

Owns the folders, the checks of listings and headers, and reading a file:

    {train,val}/<column>/<i>.npy, i from 0 without gaps; every column has the same frames

What the numbers mean is checked in `validation`. Nothing here unpickles: a file that holds Python
objects is refused.
"""

from __future__ import annotations

import math
import os
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.files import compare_splits, is_hidden, listing, visible
from repmtl_ray.data.stream import MissingSplitError


class Header(NamedTuple):
    """What a file says about itself.

    Attributes:
        shape, dtype: of the array.
        raw: the bytes before the array; equal bytes mean equal headers.
        num_bytes: of the whole file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    raw: bytes
    num_bytes: int


@dataclass(frozen=True)
class NpyFolder:
    """A folder of frames.

    Args:
        dataset: begins every error message.
        root: folder of the data set.
        part: folder of the frames in `root`, for example "train/depth".
    """

    dataset: str
    root: Path
    part: str

    @property
    def path(self) -> Path:
        return self.root / self.part

    def file(self, frame: int) -> Path:
        return self.path / f"{frame}.npy"

    def label(self, frame: int) -> str:
        """How error messages call a frame's file."""
        return f"{self.dataset}: {self.part}/{frame}.npy"

    def num_frames(self) -> int:
        """How many frames there are.

        Raises:
            ValueError: none, a gap in their numbers, or an npy file that is not a frame.
        """
        holds = [path.name for path in self.path.iterdir() if not is_hidden(path.name)]
        frames = set()
        for name in holds:
            stem, dot, suffix = name.rpartition(".")
            if dot + suffix != ".npy":
                continue
            if not (stem.isascii() and stem.isdigit() and str(int(stem)) == stem):
                raise ValueError(
                    f"{self.dataset}: {self.part}/{name} is not the name of a frame; expected "
                    "0.npy, 1.npy, 2.npy, ... without leading zeros; rename or remove it."
                )
            frames.add(int(stem))
        if not frames:
            raise ValueError(
                f"{self.dataset}: {self.part} has no frames, expected 0.npy, 1.npy, ...; "
                f"{self.path} holds {listing(holds)}."
            )
        for frame in range(len(frames)):
            if frame not in frames:
                raise ValueError(
                    f"{self.dataset}: {self.part} has {len(frames)} frames up to "
                    f"{max(frames)}.npy, but no {frame}.npy; frames are numbered from 0 without "
                    "gaps: restore it or re-run the preparation."
                )
        return len(frames)

    def common_header(self, num_frames: int) -> Header:
        """The header that all frames share; reads a few bytes of every file and no array.

        Raises:
            ValueError: a file that cannot be used, or two that disagree in shape or dtype.
        """
        first = read_header(self.file(0), self.label(0))
        for frame in range(1, num_frames):
            try:
                with self.file(frame).open("rb") as file:
                    same = file.read(len(first.raw)) == first.raw
                    same = same and os.fstat(file.fileno()).st_size == first.num_bytes
            except OSError:
                same = False
            if same:
                continue
            other = read_header(self.file(frame), self.label(frame))
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                what = "shape" if other.shape != first.shape else "dtype"
                raise ValueError(
                    f"{self.label(frame)} has {what} {getattr(other, what)}, expected "
                    f"{getattr(first, what)} like the {frame} file{'s' * (frame > 1)} before it; "
                    "re-run the preparation."
                )
        return first

    def load(self, frame: int) -> NDArray[Any]:
        """One frame's array.

        Raises:
            ValueError: the file cannot be used.
        """
        read_header(self.file(frame), self.label(frame))
        try:
            return np.load(self.file(frame), allow_pickle=False)
        except (OSError, EOFError) as error:  # it shrank since its header was read
            raise ValueError(f"{self.label(frame)} cannot be read: {error}.") from error


def read_header(path: Path, label: str) -> Header:
    """Reads a file's header and compares the file's length with what it announces.

    Args:
        path: of the file.
        label: what error messages call it.

    Raises:
        ValueError: unreadable, not an npy file, pickled objects, not numbers, or truncated.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            start = file.tell()
            file.seek(0)
            raw = file.read(start)
            num_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{label} cannot be read: {error.strerror}.") from error
    except (ValueError, tokenize.TokenError) as error:  # NumPy tokenizes some headers
        raise ValueError(
            f"{label} is not an npy file ({error}); copy it again or re-run the preparation."
        ) from error
    if dtype.hasobject:
        raise ValueError(
            f"{label} holds pickled Python objects, which are not loaded because they can run "
            "code; save it again as an array of numbers."
        )
    if dtype.kind not in "uif":
        raise ValueError(f"{label} has dtype {dtype}, expected integers or floats.")
    if any(size < 0 for size in shape):
        raise ValueError(
            f"{label} has shape {shape}, which no array has; copy it again or re-run the preparation."
        )
    expected = start + dtype.itemsize * math.prod(shape)
    if num_bytes < expected:
        raise ValueError(
            f"{label} is truncated: {num_bytes} bytes, expected {expected} for shape {shape} of "
            f"{dtype}; copy it again or re-run the preparation."
        )
    return Header(tuple(shape), dtype, raw, num_bytes)


Folders = Mapping[str, tuple[str, ...]]
"""By column, the folder's name, and others that people use for it."""


@dataclass(frozen=True)
class NpyFrames:
    """One split of a folder; `Frames` of `dense`."""

    folders: Mapping[str, NpyFolder]
    num_frames: int
    shapes: Mapping[str, Shape]
    notes: tuple[str, ...] = field(default=())

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        return {column: folder.load(frame) for column, folder in self.folders.items()}

    def where(self, frame: int, column: str) -> str:
        return f"{self.folders[column].part}/{frame}.npy"


def open_frames(
    dense: DenseSet, names: Folders, root: Path, split: str, *, every_header: bool = True
) -> NpyFrames:
    """One split of a folder, its listings and headers checked.

    Args:
        dense: what the folder should hold.
        names: of its parts.
        root: folder that holds `train` and `val`.
        split: "train", "val" or "test" (if someone made one).
        every_header: whether to look into every file now, or into each when it is loaded.

    Raises:
        ValueError: not this layout, an empty split, a gap, a file that cannot be used, shapes that
            disagree, one image in two splits; says which file, what was found and what to do.
    """
    folders = _folders(dense, names, root, split)
    image = folders[IMAGE]
    num_frames = image.num_frames()
    for folder in folders.values():
        num_in_folder = folder.num_frames()
        if num_in_folder != num_frames:
            raise ValueError(
                f"{dense.name}: {folder.part} has {num_in_folder} frames, {image.part} has {num_frames}; "
                f"every frame needs {_and(dense.columns)}: restore the missing ones from "
                f"frame {min(num_in_folder, num_frames)} on, or remove the others."
            )
    looked_at = num_frames if every_header else 1
    shapes = {column: part.common_header(looked_at).shape for column, part in folders.items()}
    return NpyFrames(folders, num_frames, shapes, _split_notes(dense, names, root))


def _split_notes(dense: DenseSet, names: Folders, root: Path) -> tuple[str, ...]:
    """What has to be said of images that several splits have."""
    images = {
        split: [
            f"{split}/{name}/{path.name}"
            for name in names[IMAGE]
            if (root / split / name).is_dir()
            for path in visible(root / split / name)
            if path.suffix == ".npy"
        ]
        for split in ("train", "val", "test")
    }
    return compare_splits(dense.name, root, images)


def first_frame(dense: DenseSet, names: Folders, root: Path) -> NpyFrames:
    """The first training frame alone, of which one header is read.

    Raises:
        ValueError: not this layout, or that file cannot be used.
    """
    image = _folders(dense, names, root, "train")[IMAGE]
    return NpyFrames({IMAGE: image}, 1, {IMAGE: read_header(image.file(0), image.label(0)).shape})


def is_layout(names: Folders, root: Path) -> bool:
    """Whether a folder looks like this layout, complete or not."""
    parts = [name for accepted in names.values() for name in accepted]
    return any((root / split / part).is_dir() for split in ("train", "val") for part in parts)


def layout_text(names: Folders) -> str:
    """As error messages describe the layout."""
    parts = ", ".join(" or ".join(accepted) for accepted in names.values())
    return f"{{train,val}}/{{{parts}}}/<i>.npy"


def _folders(dense: DenseSet, names: Folders, root: Path, split: str) -> dict[str, NpyFolder]:
    """The folders of every column, which exist."""
    expected = layout_text(names)
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{dense.name}: {root} {problem}; expected a folder with {expected}. Set data.path to "
            "it, or to None for rendered scenes."
        )
    if split == "test" and not (root / "test").is_dir():
        raise MissingSplitError(
            f"{dense.name}: {root} has no test split; evaluate on the split 'val', as the "
            "benchmark does."
        )
    folders = {}
    for column, accepted in names.items():
        there = [name for name in accepted if (root / split / name).is_dir()]
        if there:
            folders[column] = NpyFolder(dense.name, root, f"{split}/{there[0]}")
            continue
        where = root / split if (root / split).is_dir() else root
        holds = listing(path.name for path in visible(where))
        others = f" (or {', '.join(accepted[1:])})" if len(accepted) > 1 else ""
        raise ValueError(
            f"{dense.name}: {root} has no folder {split}/{accepted[0]}{others}; expected "
            f"{expected}; {where} holds {holds}.{_nearby(root, split)}"
        )
    return folders


def _nearby(root: Path, split: str) -> str:
    """A hint, if the data set is one folder up or down."""
    inside = [path for path in visible(root) if (path / split / "image").is_dir()]
    for path in [*inside, root.parent]:
        if (path / split / "image").is_dir():
            return f" Did you mean {path}?"
    return ""


def _and(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
