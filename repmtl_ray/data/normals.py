"""Surface normals estimated from depth, for data that has none.

Owns the estimate. Axes: x to the right, y up, z towards the camera, as in the rendered rooms.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

WINDOW = 9
"""Pixels across the square that a plane is fitted to."""
_LARGEST_RESIDUAL = 0.01
"""Of a plane, root mean square, in units of the distance to it; more is an edge between two."""


def estimate_normals(
    depth: NDArray[Any], *, focal: tuple[float, float], centre: tuple[float, float]
) -> NDArray[np.float32]:
    """The normal of the plane through each pixel's neighbours.

    The plane n . p = -1 is fitted to the points p of a window by least squares. A pixel has no
    normal where depth is invalid, where less than half of its window is valid, and where its
    window is not nearly flat: across edges.

    Args:
        depth: [H, W], metres along the optical axis, 0 where invalid.
        focal: pixels, across and down.
        centre: of the image, pixels from the left and from the top.

    Returns:
        [H, W, 3], unit vectors towards the camera; zero where there is none.
    """
    metres = np.asarray(depth, dtype=np.float64)
    height, width = metres.shape
    valid = metres > 0
    right = (np.arange(width) - centre[0]) / focal[0] * metres
    up = (centre[1] - np.arange(height))[:, None] / focal[1] * metres
    points = np.stack([right, up, -metres])  # invalid ones are 0 and add nothing to any sum
    share = _mean(valid.astype(np.float64))
    sums = np.stack([_mean(axis) for axis in points], axis=2)
    moments = np.empty((height, width, 3, 3))
    for row in range(3):
        for column in range(row, 3):
            moments[..., row, column] = _mean(points[row] * points[column])
            moments[..., column, row] = moments[..., row, column]
    usable = valid & (share >= 0.5)
    usable &= np.linalg.det(moments) > 1e-12 * np.trace(moments, axis1=2, axis2=3) ** 3
    moments[~usable] = np.eye(3)
    normals = -np.linalg.solve(moments, sums[..., None])[..., 0]
    residual = 1 + (normals * sums).sum(axis=2) / np.where(usable, share, 1)
    usable &= residual < _LARGEST_RESIDUAL**2
    length = np.linalg.norm(normals, axis=2)
    normals /= np.where(length > 0, length, 1)[..., None]
    return np.where(usable[..., None], normals, 0).astype(np.float32)


def _mean(values: NDArray[Any]) -> NDArray[Any]:
    """Over the window; beyond the image there is nothing."""
    return cv2.blur(values, (WINDOW, WINDOW), borderType=cv2.BORDER_CONSTANT)
