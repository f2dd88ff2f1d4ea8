"""The geometry of a view: a window resized to the whole size, and a flip, of an image and its targets.

Owns what a view is made of, and how OpenCV alone makes it: the twin of `views_albumentations.py`, with
the same values to the bit. The last release of albumentations is 2.0.8, its repository is archived, and
it may not run with a later NumPy or Python. Then uninstall it, and `augment.py` takes the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""By column, [H, W] or [H, W, channels]."""
Columns: TypeAlias = tuple[tuple[str, Literal["image", "mask"]], ...]
"""How every column is resampled: an image bilinearly, a mask by the pixel nearest to the centre."""
Window: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels; right and bottom are the first outside."""
Geometry: TypeAlias = Callable[[Arrays, Columns, Window | None, bool], Arrays]
"""Takes arrays, how they are resampled, the window or None for the whole image, and whether to flip left
and right; gives arrays of the same shapes and types."""


def by_opencv(arrays: Arrays, columns: Columns, window: Window | None, flip: bool) -> Arrays:
    """Makes a view by OpenCV alone; arguments and result are those of `Geometry`."""
    moved = dict(arrays)
    for name, how in columns:
        if name not in arrays:
            continue
        values = arrays[name]
        if window is not None:
            height, width = values.shape[:2]
            left, top, right, bottom = window
            # Nearest to the pixel's centre, as bilinear is; plain INTER_NEAREST takes its corner.
            chosen = cv2.INTER_LINEAR if how == "image" else cv2.INTER_NEAREST_EXACT
            resized = cv2.resize(
                values[top:bottom, left:right], (width, height), interpolation=chosen
            )
            values = resized.reshape(values.shape)
        moved[name] = np.ascontiguousarray(values[:, ::-1]) if flip else values
    return moved
