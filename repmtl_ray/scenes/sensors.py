"""The errors of a camera, of a depth sensor and of an annotator.

Owns exposure, noise, pixels without depth and pixels without a label.
"""

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes.raycast import Floats, value_noise


def expose(rng: np.random.Generator, radiance: Floats) -> NDArray[np.float32]:
    """The picture, [height, width, 3], of the light, [3, height, width]."""
    gain = rng.uniform(0.75, 1.2) * rng.uniform(0.92, 1.08, 3)
    picture = np.moveaxis(radiance, 0, 2).astype(np.float32) * gain.astype(np.float32)
    spread = np.float32(rng.uniform(0.005, 0.025))
    picture += spread * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0.0, 1.0)


def with_ignored(
    rng: np.random.Generator, labels: NDArray[np.int16], hidden: NDArray[np.bool_]
) -> NDArray[np.int16]:
    """Labels without the hidden pixels and without a share of those at class borders."""
    border = np.zeros(labels.shape, dtype=bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    border &= rng.uniform(0.0, 0.3) > rng.random(labels.shape)
    return np.where(hidden | border, np.int16(-1), labels)


def stereo_matched(disparity: Floats) -> NDArray[np.bool_]:
    """Which pixels of a left image a perfect matcher finds in the right image.

    Args:
        disparity: [height, width], pixels, 0 at infinity.

    Returns:
        [height, width]; False where something nearer hides the point from the right camera (a
        shadow to the left of each foreground edge) or the point leaves the right image.
    """
    seen_at = np.arange(disparity.shape[1]) + 0.5 - disparity
    hidden_from = np.minimum.accumulate(seen_at[:, ::-1], axis=1)[:, ::-1]
    matched = seen_at >= 0
    matched[:, :-1] &= seen_at[:, :-1] < hidden_from[:, 1:]
    return matched


def blotches(
    noise: Floats, shape: tuple[int, int], size: float, shift: NDArray[np.float64]
) -> Floats:
    """Smooth noise over a picture, [height, width].

    Args:
        noise: [64, 64], as for `value_noise`.
        shape: (height, width).
        size: number of independent values along the picture's height.
        shift: [2], the place in the noise table.
    """
    height, width = shape
    rows, columns = np.arange(height)[:, None] / height, np.arange(width) / height
    return value_noise(noise, rows * size + shift[0], columns * size + shift[1])
