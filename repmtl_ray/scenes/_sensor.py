"""What a camera and an annotator make of a rendered scene.

Owns exposure, noise and unlabelled pixels; light is computed in `_shading` and `_lamplight`.
"""

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes._raycast import Floats


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
