"""Folders of numbered npy files, `0.npy` to `<n-1>.npy`, checked before anything uses them.

Owns reading and the errors about single files; what the numbers mean is for the data set's module.
Nothing here unpickles: a file that holds Python objects is refused.
"""

from __future__ import annotations

import math
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.files import is_hidden, listing


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
