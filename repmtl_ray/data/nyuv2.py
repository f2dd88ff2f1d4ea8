"""NYUv2: 13 classes, depth in metres and a surface normal at every pixel of a room.

Owns what the data set is, its npy layout, and the MATLAB files that its authors hand out:

    {train,val}/image/<i>.npy   [H, W, 3] or [3, H, W]; floats in 0..1 or integers in 0..255
    {train,val}/label/<i>.npy   [H, W]; 0 to 12, -1 to ignore
    {train,val}/depth/<i>.npy   [H, W, 1], [1, H, W] or [H, W]; metres, invalid 0
    {train,val}/normal/<i>.npy  [H, W, 3] or [3, H, W]; unit vectors, invalid zero

Whether a normal is valid is read from its length, never from the sum of its components, which older
code tests: valid ones may sum to 0.

    nyu_depth_v2_labeled.mat  HDF5, axes reversed as MATLAB writes them: images [N, 3, W, H] bytes,
                              depths [N, W, H] metres, labels [N, W, H] 0 (unlabelled) to 894, names
                              [1, 894] references to strings
    splits.mat                trainNdxs, testNdxs: frame numbers from 1; test is our split `val`
    classMapping40.mat        mapClass [894]: label to one of 40 classes
    class13Mapping.mat        classMapping13.labels13 [40]: to one of 13 classes (or [894], at once)

The file has no normals: they are estimated from depth (`normals`), which the stream's notes say.
Copies that another program saved may hold other types: whole numbers are taken for what they are,
anything else is refused. The small files are read in MATLAB's versions 5 and 7.3. Needs h5py and
SciPy, the extra `mat`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray import extras
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE
from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.files import listing, visible
from repmtl_ray.data.normals import estimate_normals
from repmtl_ray.data.npy import Folders
from repmtl_ray.data.stream import MissingSplitError

CLASSES = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)
NUM_CLASSES = len(CLASSES)
SEGMENTATION = "segmentation"
DEPTH = "depth"
NORMAL = "normal"

NYUV2 = DenseSet(
    name="nyuv2",
    num_classes=NUM_CLASSES,
    targets={SEGMENTATION: "label", DEPTH: "depth", NORMAL: "normal"},
    size=(288, 384),
)
FOLDERS: Folders = {
    IMAGE: ("image",),
    SEGMENTATION: ("label",),
    DEPTH: ("depth",),
    NORMAL: ("normal",),
}


FILE = "nyu_depth_v2_labeled.mat"
NOTE = (
    "nyuv2: normals are estimated from depth, not measured; metrics of the task 'normal' cannot be "
    "compared with those on other normals."
)
FOCAL = (518.8579, 519.4696)  # pixels, of the colour camera at 640 x 480, as the authors give it
CENTRE = (325.5824, 253.7362)

_DATASETS = {IMAGE: "images", DEPTH: "depths", SEGMENTATION: "labels", NORMAL: "depths"}
_SPLIT = {"train": "trainNdxs", "val": "testNdxs"}


@dataclass(frozen=True)
class MatFrames:
    """One split; `Frames` of `dense`.

    Args:
        file: the HDF5 file.
        frames: numbers of the split's frames in it, from 0.
        label_of: [labels + 1], class of each stored label.
        size: (height, width).
    """

    file: Path
    frames: tuple[int, ...]
    label_of: tuple[int, ...]
    size: tuple[int, int]
    notes: tuple[str, ...] = (NOTE,)

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        with_three: Shape = (*self.size, 3)
        return {IMAGE: with_three, SEGMENTATION: self.size, DEPTH: self.size, NORMAL: with_three}

    def where(self, frame: int, column: str) -> str:
        number = self.frames[frame]
        return f"{self.file.name} {_DATASETS[column]}[{number}]"

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        stored = _opened(self.file)
        number = self.frames[frame]
        try:
            image, depth, labels = (
                np.asarray(stored[name][number]).T for name in ("images", "depths", "labels")
            )
        except OSError as error:
            raise ValueError(
                f"nyuv2: {self.file.name} frame {number} cannot be read ({error}); copy the file "
                "again."
            ) from error
        if not np.isfinite(depth).all() or depth.min() < 0:
            where = self.where(frame, DEPTH)
            raise ValueError(
                f"nyuv2: {where} has values that are negative, NaN or infinite; expected metres, "
                "0 where invalid."
            )
        labels = _whole(labels, f"nyuv2: {self.where(frame, SEGMENTATION)}", len(self.label_of) - 1)
        if image.dtype.kind == "f" and image.max() > 1.01:  # bytes, saved as floats
            image = _whole(image, f"nyuv2: {self.where(frame, IMAGE)}", 255).astype(np.uint8)
        scale = self.size[1] / 640, self.size[0] / 480
        return {
            IMAGE: image,
            SEGMENTATION: np.array(self.label_of, dtype=np.int16)[labels],
            DEPTH: depth,
            NORMAL: estimate_normals(
                depth,
                focal=(FOCAL[0] * scale[0], FOCAL[1] * scale[1]),
                centre=(CENTRE[0] * scale[0], CENTRE[1] * scale[1]),
            ),
        }


def open_frames(path: Path, split: str) -> MatFrames:
    """One split, with the headers of all four files checked.

    Args:
        path: of nyu_depth_v2_labeled.mat, or the folder of all four files.
        split: "train" or "val".

    Raises:
        ValueError: h5py or SciPy is missing; a file is missing, cut off or lacks what it should
            hold; splits or class mappings that do not fit the frames.
    """
    file = path if path.suffix == ".mat" else path / FILE
    if split == "test":
        raise MissingSplitError(
            "nyuv2: the official files have a training and a test part; the test part is the split "
            "'val', as in the benchmark."
        )
    stored = _opened(file)
    shapes = {}
    for name, num_axes in (("images", 4), ("depths", 3), ("labels", 3)):
        if name not in stored:
            raise ValueError(f"nyuv2: {file.name} has no {name}; it holds {listing(list(stored))}.")
        shapes[name] = stored[name].shape
        if len(shapes[name]) != num_axes:
            raise ValueError(
                f"nyuv2: {file.name} {name} has shape {shapes[name]}, expected {num_axes} axes, "
                "frames first."
            )
        if stored[name].dtype.kind not in "uif":
            raise ValueError(
                f"nyuv2: {file.name} {name} has dtype {stored[name].dtype}, expected numbers; take "
                "the official file."
            )
    num_frames, _, width, height = shapes["images"]
    for name, expected in (
        ("images", (num_frames, 3, width, height)),
        ("depths", (num_frames, width, height)),
        ("labels", (num_frames, width, height)),
    ):
        if shapes[name] != expected:
            raise ValueError(
                f"nyuv2: {file.name} {name} has shape {shapes[name]}, expected {expected} like "
                "images, with MATLAB's order of axes."
            )
    if width < height:
        raise ValueError(
            f"nyuv2: {file.name} images has shape {shapes['images']}: {width} pixels across and "
            f"{height} down, with MATLAB's order of axes (frames, channels, width, height); the "
            "pictures are wider than high, so two axes were exchanged: take the official file."
        )
    frames = _frames_of(file.parent, split, num_frames)
    return MatFrames(
        file,
        frames,
        _label_table(file.parent, stored["names"].size if "names" in stored else None),
        (height, width),
    )


def is_official(path: Path) -> bool:
    """Whether a path is the official file or the folder that holds it."""
    return path.suffix == ".mat" or (path / FILE).exists()


def _frames_of(folder: Path, split: str, num_frames: int) -> tuple[int, ...]:
    stored = _loaded(folder / "splits.mat")
    known: dict[int, str] = {}
    for name in _SPLIT.values():
        if name not in stored:
            raise ValueError(f"nyuv2: splits.mat has no {name}; it holds {_fields(stored)}.")
        for number in _whole(np.ravel(stored[name]), f"nyuv2: splits.mat {name}").tolist():
            if not 1 <= number <= num_frames:
                hint = "; numbers begin with 1, as in MATLAB" if number == 0 else ""
                raise ValueError(
                    f"nyuv2: splits.mat {name} has frame {number}, expected 1 to {num_frames}{hint}."
                )
            if number in known:
                raise ValueError(
                    f"nyuv2: splits.mat has frame {number} in {known[number]} and in {name}; "
                    "a frame is one sample of one split."
                )
            known[number] = name
    frames = tuple(number - 1 for number, name in known.items() if name == _SPLIT[split])
    if not frames:
        raise ValueError(f"nyuv2: splits.mat {_SPLIT[split]} is empty.")
    return frames


def _label_table(folder: Path, num_names: int | None) -> tuple[int, ...]:
    """Class 0 to 12, or -1, of each stored label."""
    forty = _loaded(folder / "classMapping40.mat")
    if "mapClass" not in forty:
        raise ValueError(f"nyuv2: classMapping40.mat has no mapClass; it holds {_fields(forty)}.")
    label = "nyuv2: classMapping40.mat mapClass"
    to_forty = [0, *_whole(np.ravel(forty["mapClass"]), label, 40).tolist()]
    if num_names not in (None, len(to_forty) - 1):
        raise ValueError(
            f"nyuv2: classMapping40.mat maps {len(to_forty) - 1} labels, but {FILE} names "
            f"{num_names}; take both from one source."
        )
    thirteen = _loaded(folder / "class13Mapping.mat")
    mapping = thirteen.get("classMapping13")
    if isinstance(mapping, Mapping):  # a struct of a MATLAB 7.3 file
        mapping = mapping.get("labels13")
    elif mapping is not None and mapping.dtype.names and "labels13" in mapping.dtype.names:
        mapping = mapping["labels13"].flat[0]
    if mapping is None or np.size(mapping) not in (40, len(to_forty) - 1):
        holds = _fields(thirteen) if mapping is None else f"a mapping of {np.size(mapping)} labels"
        raise ValueError(
            f"nyuv2: class13Mapping.mat holds {holds}, expected classMapping13.labels13 of 40."
        )
    label = "nyuv2: class13Mapping.mat classMapping13.labels13"
    to_thirteen = [0, *_whole(np.ravel(mapping), label, NUM_CLASSES).tolist()]
    at_once = len(to_thirteen) > 41
    codes = [to_thirteen[label if at_once else to_forty[label]] for label in range(len(to_forty))]
    return tuple(code - 1 if code else IGNORE_LABEL for code in codes)


def _whole(values: NDArray[Any], label: str, highest: int | None = None) -> NDArray[np.int64]:
    """Numbers of any type as integers from 0 to `highest`, if that is what they are.

    Programs that save the official files again often store integers as doubles.
    """
    expected = "whole numbers" if highest is None else f"whole numbers from 0 to {highest}"
    if values.dtype.kind not in "uif":
        raise ValueError(f"{label} has dtype {values.dtype}, expected {expected}.")
    whole = values.astype(np.float64)
    strange = ~np.isfinite(whole) | (whole != np.rint(whole))
    if highest is not None:
        strange |= (whole < 0) | (whole > highest)
    if strange.any():
        examples = ", ".join(f"{value:g}" for value in np.unique(whole[strange])[:4].tolist())
        raise ValueError(
            f"{label} has {np.count_nonzero(strange)} values such as {examples}; expected {expected}."
        )
    return whole.astype(np.int64)


_files: dict[tuple[int, str, int], Any] = {}
"""Open HDF5 files by process (a fork must not share one), path and time of change."""


def _opened(file: Path) -> Any:
    h5py, _ = _libraries()
    try:
        key = (os.getpid(), str(file), file.stat().st_mtime_ns)
        if key not in _files:
            _files[key] = h5py.File(file, "r")
    except OSError as error:
        reason = error.strerror or str(error)
        if _is_matlab_5(file):
            raise ValueError(
                f"nyuv2: {file} is a MATLAB 5 file, which has to be read whole; save it again with "
                f"-v7.3, as the official {FILE} is."
            ) from error
        raise ValueError(
            f"nyuv2: {file} cannot be read ({reason}); expected the official {FILE}, with "
            "splits.mat, classMapping40.mat and class13Mapping.mat beside it."
        ) from error
    return _files[key]


def _is_matlab_5(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(10) == b"MATLAB 5.0"
    except OSError:
        return False


def _loaded(file: Path) -> dict[str, Any]:
    h5py, io = _libraries()
    try:
        if h5py.is_hdf5(file):  # saved again by MATLAB with -v7.3
            with h5py.File(file, "r") as stored:
                return {name: _from_hdf5(item) for name, item in stored.items()}
        return io.loadmat(file)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        problem = "is missing" if not file.exists() else f"cannot be read ({error})"
        holds = listing(path.name for path in visible(file.parent))
        raise ValueError(
            f"nyuv2: {file.name} {problem}; expected it beside {FILE}; {file.parent} holds {holds}."
        ) from error


def _from_hdf5(item: Any) -> Any:
    """A struct as a dict, a matrix with the order of axes that MATLAB shows."""
    if hasattr(item, "items"):
        return {name: _from_hdf5(inside) for name, inside in item.items()}
    return np.asarray(item).T


def _fields(stored: Mapping[str, Any]) -> str:
    return listing([name for name in stored if not name.startswith("__")])


def _libraries() -> tuple[Any, Any]:
    extras.require(f"nyuv2: {FILE}", "mat")
    import h5py
    import scipy.io

    return h5py, scipy.io
