"""Rendered scenes on a cluster: a node that has not got the driver's folder renders what it reads.

Owns nothing but that choice; pixels are the renderer's (`street_scenes`, `rooms`), reading a folder
is its reader's. A scene is a function of its series and number, so every node makes the same one.
(To the last bit on the same kind of processor; the renderers say so.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.stream import Sample, Stream
from repmtl_ray.scenes._rendered import Render, write_alone


def on_any_node(
    root: Path,
    split: str,
    open_split: Callable[[Path], Stream],
    render: Render,
    *,
    seed: int,
    height: int,
    width: int,
) -> Stream:
    """One split of a rendered folder, whose samples any process of the cluster can load.

    Args:
        root: the whole data set, complete on this machine.
        split: "train" or "val".
        open_split: opens this split of a folder of the same layout; picklable.
        render: the renderer's function.
        seed, height, width: as the folder was rendered.
    """
    stream = open_split(root)
    load = _Load(root, split, open_split, stream.load, render, seed, height, width)
    return replace(stream, load=load)


@dataclass(frozen=True)
class _Load:
    """Loads one sample from the folder or, where there is none, from a scene rendered now."""

    root: Path
    split: str
    open_split: Callable[[Path], Stream]
    load: Callable[[int], Sample]
    render: Render
    seed: int
    height: int
    width: int

    def __call__(self, index: int) -> Sample:
        if self.root.is_dir():  # is renamed into place when complete
            return self.load(index)
        with tempfile.TemporaryDirectory(prefix="repmtl_ray-") as folder:
            alone = Path(folder)
            write_alone(
                self.render,
                alone,
                self.split,
                index,
                seed=self.seed,
                height=self.height,
                width=self.width,
            )
            sample = self.open_split(alone).load(0)
        return {**sample, SAMPLE_ID: np.asarray(index, dtype=np.int64)}
