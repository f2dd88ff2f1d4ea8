"""Dense data in the community's npy layout.

Owns the folders and the checks of listings and headers:

    {train,val}/<column>/<i>.npy, i from 0 without gaps; every column has the same frames

Single files are read in `npy`, their content is checked in `dense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from repmtl_ray.data.columns import IMAGE
from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.files import compare_splits, listing, visible
from repmtl_ray.data.npy import NpyFolder, read_header

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
        found = folder.num_frames()
        if found != num_frames:
            raise ValueError(
                f"{dense.name}: {folder.part} has {found} frames, {image.part} has {num_frames}; "
                f"every frame needs {_and(dense.columns)}: restore the missing ones from "
                f"frame {min(found, num_frames)} on, or remove the others."
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
        found = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{dense.name}: {root} {found}; expected a folder with {expected}. Set data.path to "
            "it, or to None for rendered scenes."
        )
    if split == "test" and not (root / "test").is_dir():
        raise ValueError(
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
