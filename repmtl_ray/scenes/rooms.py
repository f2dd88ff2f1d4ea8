"""Rendered rooms in the npy layout of NYUv2: the data set that needs no download.

Owns the light of a room and the columns of a scene. The room is laid out in `room_layout`.

    image   [height, width, 3] uint8
    label   [height, width] int16; 0 to 12 as in `furniture`, -1 to ignore
    depth   [height, width, 1] float32, metres along the optical axis; 0 where it is invalid
    normal  [height, width, 3] float32, unit, exact; zero where depth is invalid

Normals are in the camera's axes: x to the right, y up, z towards the camera.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes.furniture import WINDOW
from repmtl_ray.scenes.materials import Piece, Rng, in_shadow, surface_colours
from repmtl_ray.scenes.raycast import Floats, Hits, dot, trace, visible_points
from repmtl_ray.scenes.room_layout import FOCAL, Room, interior
from repmtl_ray.scenes.scene_cache import Renderer, Scene, check_view
from repmtl_ray.scenes.sensors import blotches, expose, stereo_matched, with_ignored

_BASELINE = 0.075  # metres between the projector and the camera of a Kinect


def render(seed: int, index: int, *, height: int, width: int) -> Scene:
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
        The columns above. Depth and normals are those of the solids, without noise; they are
        invalid where a depth camera sees nothing: beside foreground edges, on some glass, in holes
        and at the border.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_view("render", seed, index, height, width)
    # One stream a concern: how many numbers a picture takes must not change its room or light.
    rng, light, sensor, camera_errors, annotator = np.random.default_rng([seed, index, 1]).spawn(5)
    camera, room, pieces = interior(rng)
    noise = rng.random((64, 64))
    solids = [piece.solid for piece in pieces]
    metres, ids = trace(camera, solids, noise, height=height, width=width)
    assert (ids >= 0).all(), "the walls of a room are closed"
    hits = visible_points(camera, solids, metres, ids, np.float64)
    radiance = _light(light, room, pieces, noise, hits).reshape(3, height, width)
    right, up, forward = camera.to_world.T
    outward = hits.normals
    normals = np.stack([dot(right, outward), dot(up, outward), -dot(forward, outward)])

    labels = np.array([piece.look.label for piece in pieces], dtype=np.int16)[ids]
    seen = _measured(sensor, noise, metres, labels == WINDOW)
    vectors = np.moveaxis(normals.reshape(3, height, width), 0, 2) * seen[:, :, None]
    unlabelled = blotches(noise, (height, width), 3.0, annotator.uniform(0.0, 64.0, 2))
    hidden = unlabelled < np.quantile(unlabelled, annotator.uniform(0.0, 0.15))
    return {
        "image": np.rint(255.0 * expose(camera_errors, radiance)).astype(np.uint8),
        "label": with_ignored(annotator, labels, hidden),
        "depth": np.where(seen, metres, 0.0).astype(np.float32)[:, :, None],
        "normal": vectors.astype(np.float32),
    }


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


def _light(rng: Rng, room: Room, pieces: list[Piece], noise: Floats, hits: Hits) -> Floats:
    """Light that reaches the camera from each point, [3, points]: a lamp and a window's daylight.

    Args:
        rng: draws lamp and daylight.
        room, pieces: the air, and what is in it.
        noise: [64, 64] in [0, 1].
        hits: the visible points.
    """
    lamp_x, lamp_y = -room.right + room.width * rng.uniform(0.35, 0.65), room.height - 0.15
    lamp = np.array([lamp_x, lamp_y, room.near + room.depth * rng.uniform(0.35, 0.6)])
    side, daylight = rng.choice((-1.0, 1.0)), rng.uniform(0.0, 0.45)
    warm = np.array([1.0, rng.uniform(0.86, 1.0), rng.uniform(0.68, 0.98)])[:, None]
    albedo = surface_colours(pieces, hits, noise)

    towards = lamp[:, None] - hits.points
    distance = np.sqrt(dot(towards, towards))
    facing = np.maximum(dot(towards / distance, hits.normals), 0.0)
    # Seen from the furniture the lamp is nearly overhead: one direction for all shadows.
    direction = np.array([rng.normal(0.0, 0.25), 1.0, rng.normal(0.0, 0.25)])
    direction /= np.linalg.norm(direction)
    candidates = (facing > 0.0) & (hits.points[1] < room.height - 0.05)
    dark = in_shadow(pieces, hits, candidates, direction, noise, lift=0.01)
    facing[dark] *= rng.uniform(0.2, 0.45)  # light comes from the walls too
    strength = rng.uniform(0.8, 1.4) * facing / (1.0 + (distance / 3.0) ** 2)
    from_window = daylight * np.maximum(side * hits.normals[0] * 0.8 - hits.normals[2] * 0.2, 0.0)
    ambient = rng.uniform(0.45, 0.7) * _openness(room, hits)
    return albedo * (warm * (ambient + strength) + from_window)


def _openness(room: Room, hits: Hits) -> Floats:
    """Less than 1 where another side of the room is near: corners are darker."""
    x, y, z = hits.points
    gaps = (
        np.minimum(x + room.right, room.right - x),
        np.minimum(y, room.height - y),
        np.minimum(z - room.near, room.far - z),
    )
    openness = np.ones_like(x)
    for gap, normal in zip(gaps, hits.normals, strict=True):
        across = 1.0 - np.abs(normal)  # a wall does not darken itself
        openness *= 1.0 - 0.4 * across * np.exp(-np.maximum(gap, 0.0) / 0.25)
    return openness


def _measured(
    rng: Rng, noise: Floats, metres: Floats, glass: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where a depth camera sees something, [height, width]."""
    height, width = metres.shape
    holes, size = rng.uniform(0.01, 0.12), rng.uniform(5.0, 10.0)
    texture = blotches(noise, (height, width), size, rng.uniform(0.0, 64.0, 2))
    texture = texture + 0.25 * rng.random((height, width))
    measured = stereo_matched(FOCAL * width * _BASELINE / metres)
    measured &= texture > np.quantile(texture, holes)
    if rng.random() < 0.5:  # panes let the pattern through
        measured &= ~(glass & (rng.random((height, width)) < 0.8))
    border = int(height * rng.uniform(0.0, 0.03))
    measured[:border] = measured[height - border :] = False
    return measured
