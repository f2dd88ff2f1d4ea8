"""Rendered scenes as the frames of a dense data set.

Owns the way from the cache of rendered scenes to `Frames`; the cache itself is `scenes.scene_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.npy import Folders
from repmtl_ray.data.stream import MissingSplitError
from repmtl_ray.scenes.scene_cache import Series, fill_cache, read_scene


@dataclass(frozen=True)
class RenderedFrames:
    """One split of a rendered data set; `Frames` of `dense`.

    Every process of a cluster can read it: a node that does not share the cache folder renders the
    scenes that it reads.
    """

    series: Series
    folder: Path
    split: str
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def num_frames(self) -> int:
        return self.series.num_scenes(self.split)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {column: self.series.shape(name) for column, name in self.names.items()}

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        scene = read_scene(self.series, self.folder, self.split, frame)
        return {column: scene[name] for column, name in self.names.items()}

    def where(self, frame: int, column: str) -> str:
        return f"{self.split}/{self.names[column]}/{frame}.npy"


def open_frames(dense: DenseSet, folders: Folders, series: Series, split: str) -> RenderedFrames:
    """One split, rendered now as far as the cache does not hold it.

    Args:
        dense: the data set that the scenes stand in for.
        folders: the renderer's names of the columns are the first ones here.
        series: the scenes.
        split: "train" or "val".

    Raises:
        ValueError: there is no such split, or the cache cannot be written.
    """
    if split == "test":
        raise MissingSplitError(
            f"{dense.name}: rendered scenes have no test split; evaluate on the split 'val'."
        )
    names = {column: accepted[0] for column, accepted in folders.items()}
    return RenderedFrames(series, fill_cache(series, split), split, names)
