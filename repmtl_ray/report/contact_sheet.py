"""Samples as pictures: what the network is shown, for eyes to check.

Owns one figure: a row a sample, a column each for its image and every target, and one augmented
view of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from repmtl_ray.data.augment import FLIP_PROBABILITY, SCALES, augment
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE
from repmtl_ray.data.stream import Kind, Sample, Stream

SAMPLES = 4
_WIDTH = 2.6  # inches of a picture


def contact_sheet(
    streams: Sequence[Stream], path: str | Path, *, title: str, num_samples: int = SAMPLES
) -> Path:
    """Writes a PNG of samples spread evenly over each stream.

    Labels have a colour a class (ignored: black), depth is bright where near (invalid: black),
    normals are (x, y, z) as red, green, blue (invalid: grey), classes of whole images are written
    above them.

    Args:
        streams: of one split.
        path: of the PNG.
        title: above the figure.
        num_samples: of each stream, at most.
    """
    rows = [
        (stream, stream.load(int(index)))
        for stream in streams
        for index in np.unique(
            np.linspace(0, stream.num_samples - 1, min(num_samples, stream.num_samples)).astype(int)
        )
    ]
    across = 2 * max(1 + sum(k != "class" for k in stream.kinds.values()) for stream in streams)
    aspect = rows[0][1][IMAGE].shape[0] / rows[0][1][IMAGE].shape[1]
    figure = Figure(
        figsize=(_WIDTH * across, (_WIDTH * aspect + 0.3) * len(rows) + 0.5), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (stream, sample) in zip(grid, rows, strict=True):
        kinds: dict[str, Kind] = {IMAGE: "image", **stream.kinds}
        view = augment(sample, rng=_turned(*sample[IMAGE].shape[:2]), kinds=kinds)
        shown = [name for name, kind in kinds.items() if kind != "class"]
        for place, (name, values) in enumerate(
            [*((name, sample[name]) for name in shown), *((name, view[name]) for name in shown)]
        ):
            line[place].imshow(_picture(values, kinds[name]), interpolation="nearest")
            line[place].set_title(_caption(stream, sample, name, place >= len(shown)), fontsize=7)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


def _turned(height: int, width: int) -> np.random.Generator:
    """A generator whose view is a crop, and flipped; draws as `augment` does."""
    window = int(height / SCALES[-1]), int(width / SCALES[-1])
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        if rng.integers(len(SCALES)) == len(SCALES) - 1:
            rng.integers(height - window[0] + 1)
            rng.integers(width - window[1] + 1)
            if rng.random() < FLIP_PROBABILITY:
                return np.random.default_rng(seed)
    raise AssertionError("one seed in six does")


def _caption(stream: Stream, sample: Sample, name: str, augmented: bool) -> str:
    text = f"{stream.name} {int(sample['sample_id'])}" if name == IMAGE else name
    if name == IMAGE:
        classes = [task for task, kind in stream.kinds.items() if kind == "class"]
        text += "".join(f", class {int(sample[task])}" for task in classes)
    return f"{text}, augmented" if augmented else text


def _picture(values: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Something that imshow shows as meant."""
    if kind == "label":
        colors = colormaps["tab20"](np.arange(256) % 20)[:, :3]
        return np.where((values == IGNORE_LABEL)[:, :, None], 0.0, colors[np.clip(values, 0, 255)])
    if kind in ("depth", "inverse_depth"):
        plane = values[:, :, 0].astype(np.float64)
        valid = plane > 0
        near = np.where(
            valid, plane if kind == "inverse_depth" else 1 / np.where(valid, plane, 1), 0
        )
        top = np.percentile(near[valid], 99) if valid.any() else 1.0
        return np.where(valid[:, :, None], colormaps["viridis"](near / top)[:, :, :3], 0.0)
    if kind == "normal":
        return np.clip((values + 1) / 2, 0, 1)
    return values if values.dtype == np.uint8 else np.clip(values, 0, 1)
