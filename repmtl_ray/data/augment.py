"""Random scale-crop and flip of a training sample, the image and all its targets together.

Owns what a geometric change means for each kind of target, and which library makes it. All randomness
comes from the generator handed in, so the same generator gives the same sample anywhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.stream import Kind, Sample
from repmtl_ray.data.views import Geometry, by_opencv

SCALES = (1.0, 1.2, 1.5)
FLIP_PROBABILITY = 0.5

_VALID = "valid_"  # and the column's name: which of its normals are valid
_RESAMPLED: dict[Kind, Literal["image", "mask"]] = {
    "image": "image",  # bilinear
    "normal": "image",
    "label": "mask",  # nearest
    "depth": "mask",
    "inverse_depth": "mask",
}


def augment(sample: Sample, *, rng: np.random.Generator, kinds: Mapping[str, Kind]) -> Sample:
    """A random view of a sample, of the same size and dtypes.

    A scale s is drawn from SCALES, then a window of int(H / s) x int(W / s) pixels, which is
    resized back, then whether to flip left and right. Things then look s times as near: depth is
    divided by s, inverse depth multiplied. A flip negates x of normals. Which view it is depends on
    the generator and the image's size, not on the targets.

    Args:
        sample: has a column "image" [H, W, 3]; not modified.
        rng: four numbers are drawn from it.
        kinds: of the columns that have any meaning in space, "image" among them; the other columns,
            and those of kind "class", pass through.

    Returns:
        The same columns. Images and normals are resampled bilinearly, and normals made unit vectors
        again; labels and depths take the nearest pixel, with -1 and 0 as values like others. A
        normal is valid where its nearest pixel was.

    Source:
        Protocols `libmtl` and `last10`; the older code divides inverse depth too, and samples
        labels half a pixel off the image.
    """
    height, width = sample["image"].shape[:2]
    scale = SCALES[rng.integers(len(SCALES))]
    window = int(height / scale), int(width / scale)
    top = int(rng.integers(height - window[0] + 1))
    left = int(rng.integers(width - window[1] + 1))
    flip = rng.random() < FLIP_PROBABILITY

    spatial = tuple((name, kind) for name, kind in kinds.items() if kind in _RESAMPLED)
    moved = {name: sample[name] for name, _ in spatial}
    columns = [(name, _RESAMPLED[kind]) for name, kind in spatial]
    for name, kind in spatial:
        if kind == "normal":
            columns.append((_VALID + name, "mask"))
            if scale != 1:
                moved[_VALID + name] = np.any(sample[name], axis=2).astype(np.uint8)
    corners = None if scale == 1 else (left, top, left + window[1], top + window[0])
    seen = geometry()(moved, tuple(columns), corners, flip)

    result = dict(sample)
    for name, kind in spatial:
        result[name] = _revalued(seen[name], kind, scale, flip, seen.get(_VALID + name))
    return result


@functools.cache
def geometry() -> Geometry:
    """What makes the views in this environment: albumentations if it is installed, else its twin.

    Both give the same values to the bit, so that no result depends on it.
    """
    if importlib.util.find_spec("albumentations") is None:
        return by_opencv
    from repmtl_ray.data.views_albumentations import by_albumentations

    return by_albumentations


def _revalued(
    values: NDArray[Any], kind: Kind, scale: float, flip: bool, valid: NDArray[Any] | None
) -> NDArray[Any]:
    """What the change of view does to the values themselves."""
    if kind == "depth":
        return values / np.float32(scale)
    if kind == "inverse_depth":
        return values * np.float32(scale)
    if kind != "normal":
        return values
    if valid is not None:
        length = np.linalg.norm(values, axis=2, keepdims=True)
        valid = valid[:, :, None].astype(bool) & (length > 1e-6)
        values = np.where(valid, values / np.where(valid, length, 1), 0).astype(values.dtype)
    return values * np.array([-1, 1, 1], dtype=values.dtype) if flip else values
