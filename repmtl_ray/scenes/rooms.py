"""Procedural rooms in the NYUv2 npy layout: the data set that needs no download.

Owns the sensors' holes and what a scene consists of. The room is laid out in `_interior`, ray-cast
in `_raycast`, lit in `_lamplight`, and written to disk by `scene_cache`. The folder is read as any
NYUv2 folder is, elsewhere.

    {train,val}/image/<i>.npy   [height, width, 3] uint8
    {train,val}/label/<i>.npy   [height, width] int16, 0 to 12 as in `nyuv2.CLASSES`, -1 to ignore
    {train,val}/depth/<i>.npy   [height, width, 1] float32, metres along the optical axis; 0 where
                                invalid
    {train,val}/normal/<i>.npy  [height, width, 3] float32, unit, exact; zero where depth is invalid
    scenes.json                 what is rendered

Normals are in the camera's axes: x to the right, y up, z towards the camera.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes._furniture import WINDOW
from repmtl_ray.scenes._interior import FOCAL, interior
from repmtl_ray.scenes._lamplight import shade
from repmtl_ray.scenes._raycast import (
    Floats,
    camera_rays,
    dot,
    stereo_matched,
    surface,
    trace,
    value_noise,
)
from repmtl_ray.scenes._sensor import expose, with_ignored
from repmtl_ray.scenes.scene_cache import Renderer, check_view

_BASELINE = 0.075  # metres between the projector and the camera of a Kinect


def render(seed: int, index: int, *, height: int, width: int) -> dict[str, NDArray[Any]]:
    """One room.

    The room depends on (seed, index) alone, so two sizes with the same aspect show the same view.
    The same arguments give the same bits on one machine; another processor or NumPy may round
    differently.

    Args:
        seed: which series of rooms; 0 to 2**32 - 1.
        index: which room of the series; 0 to 2**32 - 1.
        height: pixels, at least 16.
        width: pixels, at least 16.

    Returns:
        By column, as described above. Depth and normals are those of the solids, without noise;
        they are invalid where a depth camera sees nothing: beside foreground edges, on some glass,
        in holes and at the border.

    Raises:
        ValueError: an argument out of its range.
    """
    check_view("render", seed, index, height, width)
    # One stream a concern: how many numbers a picture takes must not change its room or light.
    rng, light, sensor, camera_errors, annotator = np.random.default_rng([seed, index, 1]).spawn(5)
    camera, room, pieces = interior(rng)
    noise = rng.random((64, 64))
    solids = [piece.solid for piece in pieces]
    metres, ids = trace(camera, solids, noise, height=height, width=width)
    assert (ids >= 0).all(), "the walls of a room are closed"
    rays = camera_rays(camera, height, width).reshape(3, -1)
    flat_metres, flat_ids = metres.reshape(-1), ids.reshape(-1)
    points = camera.position[:, None] + flat_metres * rays
    local, axis, outward = surface(solids, flat_ids, points)
    radiance = shade(
        light, room, pieces, noise, flat_metres, points, flat_ids, local, axis, outward, width=width
    )
    right, up, forward = camera.to_world.T
    normals = np.stack([dot(right, outward), dot(up, outward), -dot(forward, outward)])

    labels = np.array([piece.look.label for piece in pieces], dtype=np.int16)[ids]
    seen = _measured(sensor, noise, metres, labels == WINDOW)
    depth = np.where(seen, metres, 0.0).astype(np.float32)
    vectors = np.moveaxis(normals.reshape(3, height, width), 0, 2) * seen[:, :, None]
    picture = expose(camera_errors, radiance.reshape(3, height, width))
    unlabelled = value_noise(noise, *_grid(annotator, height, width, 3.0))
    hidden = unlabelled < np.quantile(unlabelled, annotator.uniform(0.0, 0.15))
    return {
        "image": np.rint(255.0 * picture).astype(np.uint8),
        "label": with_ignored(annotator, labels, hidden),
        "depth": depth[:, :, None],
        "normal": vectors.astype(np.float32),
    }


def _grid(rng: np.random.Generator, height: int, width: int, size: float) -> tuple[Floats, Floats]:
    """Places in a noise table, [height, width] each."""
    rows, columns = np.arange(height)[:, None] / height, np.arange(width) / height
    shift = rng.uniform(0.0, 64.0, 2)
    return (
        rows * size + shift[0] + 0.0 * columns,
        columns * size + shift[1] + 0.0 * rows,
    )


def _measured(
    rng: np.random.Generator, noise: Floats, metres: Floats, glass: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where a depth camera sees something, [height, width]."""
    height, width = metres.shape
    holes = rng.uniform(0.01, 0.12)
    blotches = value_noise(noise, *_grid(rng, height, width, rng.uniform(5.0, 10.0)))
    blotches = blotches + 0.25 * rng.random((height, width))
    measured = stereo_matched(FOCAL * width * _BASELINE / metres)
    measured &= blotches > np.quantile(blotches, holes)
    if rng.random() < 0.5:  # panes let the pattern through
        measured &= ~(glass & (rng.random((height, width)) < 0.8))
    border = int(height * rng.uniform(0.0, 0.03))
    measured[:border] = measured[height - border :] = False
    return measured


ROOMS = Renderer(
    name="rooms",
    columns={
        "image": ("uint8", 3),
        "label": ("int16", None),
        "depth": ("float32", 1),
        "normal": ("float32", 3),
    },
    render=render,
    version=1,
)
