"""Procedural street scenes in the Cityscapes npy layout: the data set that needs no download.

Owns the stereo matcher and what a scene consists of. The street is laid out in `_street`, ray-cast
in `_raycast`, lit in `_shading`, and written to disk by `scene_cache`. The folder is read as any
Cityscapes folder is, elsewhere.

    {train,val}/image/<i>.npy    [height, width, 3] float32 in [0, 1]
    {train,val}/label_7/<i>.npy  [height, width] int16, 0 to 6, -1 to ignore
    {train,val}/depth/<i>.npy    [height, width, 1] float32, inverse depth; 0 where invalid
    scenes.json                  what is rendered

Classes: 0 flat, 1 human, 2 vehicle, 3 construction, 4 object, 5 nature, 6 sky.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes._raycast import Floats, camera_rays, stereo_matched, trace, value_noise
from repmtl_ray.scenes._sensor import expose, with_ignored
from repmtl_ray.scenes._shading import shade
from repmtl_ray.scenes._street import FOCAL, SKY, street
from repmtl_ray.scenes.scene_cache import Renderer, check_view

CLASSES = ("flat", "human", "vehicle", "construction", "object", "nature", "sky")

BASELINE = 0.2093  # metres between the two cameras of Cityscapes
# Cityscapes stores disparity at 2048 pixels times 256 in 16 bits, and the community divides by
# 65535. So stored value = INVERSE_DEPTH / depth in metres, at every resolution.
INVERSE_DEPTH = FOCAL * 2048 * BASELINE * 256 / 65535
MAX_INVERSE_DEPTH = 0.4922  # the matcher's search range; anything nearer than 3.8 m is invalid


def render(seed: int, index: int, *, height: int, width: int) -> dict[str, NDArray[Any]]:
    """One street scene.

    The street depends on (seed, index) alone, so two sizes with the same aspect show the same view.
    The same arguments give the same bits on one machine; another processor or NumPy may round
    differently.

    Args:
        seed: which series of streets; 0 to 2**32 - 1.
        index: which street of the series; 0 to 2**32 - 1.
        height: pixels, at least 16.
        width: pixels, at least 16.

    Returns:
        image: [height, width, 3] float32 in [0, 1].
        label_7: [height, width] int16; 0 to 6 as in CLASSES, -1 to ignore (the car's own bonnet,
            part of the pixels along class borders).
        depth: [height, width, 1] float32; INVERSE_DEPTH / (metres along the optical axis), up to
            MAX_INVERSE_DEPTH; 0 where a stereo matcher would find nothing (sky, occlusions, holes).

    Raises:
        ValueError: an argument out of its range.
    """
    check_view("render", seed, index, height, width)
    # One stream a concern: how many numbers a picture takes must not change its street or light.
    rng, matcher, sensor, annotator = np.random.default_rng([seed, index]).spawn(4)
    camera, pieces = street(rng)
    noise = rng.random((64, 64))
    solids = [piece.solid for piece in pieces]
    metres, ids = trace(camera, solids, noise, height=height, width=width)
    rays = camera_rays(camera, height, width)
    radiance = shade(rng, pieces, noise, camera.position, rays, metres, ids)
    labels = np.array([piece.look.label for piece in pieces] + [SKY], dtype=np.int16)[ids]
    inverse = INVERSE_DEPTH / metres

    bonnet = _bonnet(rng, height, width)
    radiance[:, bonnet] = 0.08 + 0.12 * rng.random() + 0.1 * noise[:3, 0, None]
    inverse[~_measured(matcher, noise, inverse) | bonnet] = 0.0
    return {
        "image": expose(sensor, radiance),
        "label_7": with_ignored(annotator, labels, bonnet),
        "depth": inverse[:, :, None].astype(np.float32),
    }


def _bonnet(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Pixels of the camera's own car, [height, width]; in some scenes none."""
    top = rng.uniform(0.92, 1.04)
    across = (np.arange(width) + 0.5) / width - rng.uniform(0.45, 0.55)
    edge = top + 0.35 * across**2
    return (np.arange(height) + 0.5)[:, None] / height > edge


def _measured(rng: np.random.Generator, noise: Floats, inverse: Floats) -> NDArray[np.bool_]:
    """Where a stereo matcher finds a disparity, [height, width]; rarely in a fifth of scenes."""
    height, width = inverse.shape
    disparity = FOCAL * width * BASELINE / INVERSE_DEPTH * inverse
    holes = rng.uniform(0.5, 0.85) if rng.random() < 0.2 else rng.uniform(0.01, 0.2)
    rows, columns = np.arange(height)[:, None] / height, np.arange(width) / height
    shift, size = rng.uniform(0.0, 64.0, 2), rng.uniform(4.0, 10.0)
    blotches = value_noise(noise, rows * size + shift[0], columns * size + shift[1])
    band = int(width * rng.uniform(0.0, 0.05))
    blotches = blotches + 0.35 * rng.random((height, width))
    measured = stereo_matched(disparity) & (inverse > 0) & (inverse <= MAX_INVERSE_DEPTH)
    measured &= blotches > np.quantile(blotches, holes)
    measured[:, :band] = False
    return measured


STREETS = Renderer(
    name="street_scenes",
    columns={"image": ("float32", 3), "label_7": ("int16", None), "depth": ("float32", 1)},
    render=render,
    version=1,
)
