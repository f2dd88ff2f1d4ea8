"""Rendered street scenes in the npy layout of Cityscapes: the data set that needs no download.

Owns the light of a street and the columns of a scene. The street is laid out in `street_layout`.

    image    [height, width, 3] float32 in [0, 1]
    label_7  [height, width] int16; 0 to 6 as in CLASSES, -1 to ignore
    depth    [height, width, 1] float32, inverse depth; 0 where it is invalid
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes.materials import Piece, Rng, in_shadow, surface_colours
from repmtl_ray.scenes.raycast import (
    Camera,
    Floats,
    camera_rays,
    dot,
    trace,
    value_noise,
    visible_points,
)
from repmtl_ray.scenes.scene_cache import Renderer, Scene, check_view
from repmtl_ray.scenes.sensors import blotches, expose, stereo_matched, with_ignored
from repmtl_ray.scenes.street_layout import FOCAL, SKY, street

CLASSES = ("flat", "human", "vehicle", "construction", "object", "nature", "sky")

_BASELINE = 0.2093  # metres between the two cameras of Cityscapes
# Cityscapes stores disparity at 2048 pixels times 256 in 16 bits, and the community divides by
# 65535. So the stored value is INVERSE_DEPTH / depth in metres, at every resolution.
INVERSE_DEPTH = FOCAL * 2048 * _BASELINE * 256 / 65535
_MAX_INVERSE_DEPTH = 0.4922  # the matcher's search range: anything nearer than 3.8 m is invalid
_SHADOW_RANGE = 200.0  # metres; farther, haze and pixel size hide what shadows would show


def render(seed: int, index: int, *, height: int, width: int) -> Scene:
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
        The columns above. The label is to be ignored on the car's own bonnet and on a part of the
        pixels along class borders. Depth is INVERSE_DEPTH / (metres along the optical axis), and 0
        where a stereo matcher would find nothing (sky, occlusions, holes, very near points).

    Raises:
        ValueError: an argument is out of its range.
    """
    check_view("render", seed, index, height, width)
    # One stream a concern: how many numbers a picture takes must not change its street or light.
    rng, matcher, sensor, annotator = np.random.default_rng([seed, index]).spawn(4)
    camera, pieces = street(rng)
    noise = rng.random((64, 64))
    solids = [piece.solid for piece in pieces]
    metres, ids = trace(camera, solids, noise, height=height, width=width)
    radiance = _light(rng, camera, pieces, noise.astype(np.float32), metres, ids)
    labels = np.array([piece.look.label for piece in pieces] + [SKY], dtype=np.int16)[ids]
    inverse = INVERSE_DEPTH / metres

    bonnet = _bonnet(rng, height, width)
    radiance[:, bonnet] = 0.08 + 0.12 * rng.random() + 0.1 * noise[:3, 0, None]
    inverse[~_matched(matcher, noise, inverse) | bonnet] = 0.0
    return {
        "image": expose(sensor, radiance),
        "label_7": with_ignored(annotator, labels, bonnet),
        "depth": inverse[:, :, None].astype(np.float32),
    }


STREETS = Renderer(
    name="street_scenes",
    columns={"image": ("float32", 3), "label_7": ("int16", None), "depth": ("float32", 1)},
    render=render,
    version=1,
)


def _light(
    rng: Rng,
    camera: Camera,
    pieces: list[Piece],
    noise: Floats,
    metres: Floats,
    ids: NDArray[np.intp],
) -> Floats:
    """Light that reaches the camera: sun, shadows, sky and haze, all drawn from rng.

    Args:
        camera, pieces: the street.
        noise: [64, 64] float32 in [0, 1].
        metres, ids: [height, width], as from `trace`.

    Returns:
        [3, height, width] float32; 1 is a white that an average exposure just keeps.
    """
    overcast = rng.random() < 0.4
    bearing, rise = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.35, 1.1)
    sun = np.array([np.cos(rise) * np.sin(bearing), np.sin(rise), np.cos(rise) * np.cos(bearing)])
    sun = sun.astype(np.float32)
    strength = rng.uniform(0.05, 0.15) if overcast else rng.uniform(0.5, 0.9)
    ambient = rng.uniform(0.65, 0.85) if overcast else rng.uniform(0.35, 0.55)
    grey = rng.uniform(0.7, 0.9)
    haze = grey * np.array([0.95, 0.98, 1.0], dtype=np.float32)
    zenith = haze * (0.9 if overcast else np.array([0.55, 0.72, 0.98], dtype=np.float32))
    visibility = rng.uniform(120.0, 600.0)
    cloudy = rng.uniform(0.0, 0.25)

    radiance = np.empty((3, ids.size), dtype=np.float32)
    sky = np.flatnonzero(ids < 0)
    rays = camera_rays(camera, *ids.shape).reshape(3, -1)[:, sky]
    radiance[:, sky] = _sky(rays, noise, haze, zenith, cloudy)

    hits = visible_points(camera, [piece.solid for piece in pieces], metres, ids, np.float32)
    albedo = surface_colours(pieces, hits, noise)
    facing = np.maximum(dot(sun, hits.normals), 0.0)
    if not overcast:
        candidates = (facing > 0.0) & (hits.metres < _SHADOW_RANGE)
        facing[in_shadow(pieces, hits, candidates, sun, noise, lift=0.03)] = 0.0
    warm = np.array([1.06, 1.0, 0.9], dtype=np.float32)[:, None]
    light = ambient * (0.8 + 0.2 * hits.normals[1]) + strength * warm * facing
    clear = np.exp(hits.metres / -visibility)
    radiance[:, hits.pixels] = albedo * light * clear + haze[:, None] * (1.0 - clear)
    return radiance.reshape(3, *ids.shape)


def _sky(rays: Floats, noise: Floats, haze: Floats, zenith: Floats, cloudy: float) -> Floats:
    rise = np.clip(rays[1] / np.sqrt(dot(rays, rays)), 0.02, 1.0)
    a, b = rays[0] / (rise + 0.15), 1.0 / (rise + 0.15)
    cloud = 0.7 * value_noise(noise, 1.5 * a, 1.5 * b) + 0.3 * value_noise(noise, 5 * a, 5 * b)
    blue: Floats = haze[:, None] + (zenith - haze)[:, None] * np.minimum(rise * 2.5, 1.0)
    blue += cloudy * (cloud - 0.5)
    return blue


def _bonnet(rng: Rng, height: int, width: int) -> NDArray[np.bool_]:
    """Pixels of the camera's own car, [height, width]; some scenes have none."""
    top = rng.uniform(0.92, 1.04)
    across = (np.arange(width) + 0.5) / width - rng.uniform(0.45, 0.55)
    edge = top + 0.35 * across**2
    return (np.arange(height) + 0.5)[:, None] / height > edge


def _matched(rng: Rng, noise: Floats, inverse: Floats) -> NDArray[np.bool_]:
    """Where a stereo matcher finds a disparity, [height, width]; a fifth of scenes have few."""
    height, width = inverse.shape
    disparity = FOCAL * width * _BASELINE / INVERSE_DEPTH * inverse
    holes = rng.uniform(0.5, 0.85) if rng.random() < 0.2 else rng.uniform(0.01, 0.2)
    shift, size = rng.uniform(0.0, 64.0, 2), rng.uniform(4.0, 10.0)
    band = int(width * rng.uniform(0.0, 0.05))
    texture = blotches(noise, (height, width), size, shift) + 0.35 * rng.random((height, width))
    matched = stereo_matched(disparity) & (inverse > 0) & (inverse <= _MAX_INVERSE_DEPTH)
    matched &= texture > np.quantile(texture, holes)
    matched[:, :band] = False
    return matched
