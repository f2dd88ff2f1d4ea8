"""Light and texture of a ray-cast room.

Owns colour: the lamp, the daylight of one side, corners that are darker, and what is painted on
each surface. The camera's own errors (exposure, noise) are in `_sensor`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes._furniture import PATTERNS, Piece
from repmtl_ray.scenes._interior import FOCAL, Room
from repmtl_ray.scenes._raycast import Floats, dot, shadowed, value_noise
from repmtl_ray.scenes._shading import speckle


def shade(
    rng: np.random.Generator,
    room: Room,
    pieces: list[Piece],
    noise: Floats,
    metres: Floats,
    points: Floats,
    ids: NDArray[np.intp],
    local: Floats,
    axis: NDArray[np.intp],
    normals: Floats,
    *,
    width: int,
) -> Floats:
    """Light that reaches the camera from each surface point, [3, points].

    Args:
        rng: draws lamp and daylight.
        room: the air.
        pieces: what is in it.
        noise: [64, 64] in [0, 1].
        metres: [points], along the optical axis.
        points: [3, points], world axes.
        ids: [points], index into pieces.
        local, axis, normals: as from `_raycast.surface`.
        width: of the image, pixels.
    """
    lamp = np.array(
        [
            room.left + room.width * rng.uniform(0.35, 0.65),
            room.height - 0.15,
            room.near + room.depth * rng.uniform(0.35, 0.6),
        ]
    )
    side, daylight = rng.choice((-1.0, 1.0)), rng.uniform(0.0, 0.45)
    warm = np.array([1.0, rng.uniform(0.86, 1.0), rng.uniform(0.68, 0.98)])[:, None]
    albedo = _albedo(pieces, noise, metres / (FOCAL * width), points, ids, local, axis)

    towards = lamp[:, None] - points
    distance = np.sqrt(dot(towards, towards))
    facing = np.maximum(dot(towards / distance, normals), 0.0)
    # Seen from the furniture the lamp is nearly overhead: one direction for all shadows.
    direction = np.array([rng.normal(0.0, 0.25), 1.0, rng.normal(0.0, 0.25)])
    direction /= np.linalg.norm(direction)
    casters = [piece.solid for piece in pieces if piece.casts_shadow]
    lit = np.flatnonzero((facing > 0.0) & (points[1] < room.height - 0.05))
    dark = shadowed(points[:, lit] + 0.01 * normals[:, lit], direction, casters, noise)
    facing[lit[dark]] *= rng.uniform(0.2, 0.45)  # light comes from the walls too
    strength = rng.uniform(0.8, 1.4) * facing / (1.0 + (distance / 3.0) ** 2)
    from_window = daylight * np.maximum(side * normals[0] * 0.8 - normals[2] * 0.2, 0.0)
    ambient = rng.uniform(0.45, 0.7) * _openness(room, points, normals)
    return albedo * (warm * (ambient + strength) + from_window)


def _openness(room: Room, points: Floats, normals: Floats) -> Floats:
    """Less than 1 where another side of the room is near: corners are darker."""
    x, y, z = points
    gaps = (
        (np.minimum(x - room.left, room.left + room.width - x), 0),
        (np.minimum(y, room.height - y), 1),
        (np.minimum(z - room.near, room.near + room.depth - z), 2),
    )
    openness = np.ones_like(x)
    for gap, axis in gaps:
        across = 1.0 - np.abs(normals[axis])  # a wall does not darken itself
        openness *= 1.0 - 0.4 * across * np.exp(-np.maximum(gap, 0.0) / 0.25)
    return openness


def _albedo(
    pieces: list[Piece],
    noise: Floats,
    footprint: Floats,
    points: Floats,
    ids: NDArray[np.intp],
    local: Floats,
    axis: NDArray[np.intp],
) -> Floats:
    """Colour of each surface point, [3, points]; textures stick to the surface.

    Args:
        footprint: [points], metres that a pixel spans; finer texture fades instead of flickering.
    """
    looks = [piece.look for piece in pieces]

    def each(values: Iterable[object], at: NDArray[np.intp] = ids) -> Floats:
        return np.array(list(values), dtype=np.float64).T[..., at]

    colour = each(look.colour for look in looks)
    a, b = np.where(axis == 0, local[2], local[0]), np.where(axis == 1, local[2], local[1])
    grain, contrast = each(look.grain for look in looks), each(look.contrast for look in looks)
    speckle(colour, noise, grain, contrast, footprint, a, b, ids)

    pattern = np.array([PATTERNS.index(look.pattern) for look in looks])[ids]
    halves = [piece.solid.half for piece in pieces]
    for name in PATTERNS[1:]:
        at = np.flatnonzero(pattern == PATTERNS.index(name))
        if not at.size:
            continue
        period = each((look.period for look in looks), ids[at])
        half = each(halves, ids[at])
        wide = np.where(axis[at] == 0, half[2], half[0])
        tall = np.where(axis[at] == 1, half[2], half[1])
        patch = _Patch(a[at] / wide, b[at] / tall, a[at], b[at], period, footprint[at], ids[at])
        factor = _PAINT[name](noise, patch)
        if name in ("planks", "tiles", "stripes", "drawers"):
            colour[:, at] *= factor
        else:
            colour[:, at] = np.where(axis[at] == 2, factor, colour[:, at])
    return colour


class _Patch(NamedTuple):
    """Points of one pattern.

    Attributes:
        u, v: place on the face, -1 to 1 across and up.
        a, b: the same in metres from its middle.
        period: metres, as of a look.
        foot: metres that a pixel spans.
        ids: whose face it is.
    """

    u: Floats
    v: Floats
    a: Floats
    b: Floats
    period: Floats
    foot: Floats
    ids: NDArray[np.intp]


def _line(place: Floats, width: Floats | float, footprint: Floats) -> Floats:
    """1 on a line at every whole number of `place`, fading where a pixel is wider."""
    away = np.abs(place - np.round(place))
    cover: Floats = np.clip(0.5 + (width - away) / np.maximum(footprint, 1e-6), 0.0, 1.0)
    return cover * np.minimum(2.0 * width / np.maximum(footprint, 1e-6), 1.0)


def _planks(noise: Floats, on: _Patch) -> Floats:
    row = np.floor(on.a / on.period).astype(np.intp)
    board = np.floor(on.b / (on.period * 8) + 0.37 * row).astype(np.intp)
    tone = 0.85 + 0.3 * noise[row % 64, board % 64]
    return tone * (1.0 - 0.5 * _line(on.a / on.period, 0.02, on.foot / on.period))


def _tiles(noise: Floats, on: _Patch) -> Floats:
    joint = np.maximum(
        _line(on.a / on.period, 0.02, on.foot / on.period),
        _line(on.b / on.period, 0.02, on.foot / on.period),
    )
    tone = noise[
        np.floor(on.a / on.period).astype(np.intp) % 64,
        np.floor(on.b / on.period).astype(np.intp) % 64,
    ]
    return (0.93 + 0.14 * tone) * (1.0 - 0.35 * joint)


def _stripes(noise: Floats, on: _Patch) -> Floats:
    number = np.floor(on.a / on.period).astype(np.intp)
    fade = np.minimum(on.period / on.foot, 1.0)
    tone = noise[number % 64, (5 * on.ids) % 64] - 0.5
    return 1.0 + fade * (0.7 * tone - 0.4 * _line(on.a / on.period, 0.08, on.foot / on.period))


def _drawers(noise: Floats, on: _Patch) -> Floats:
    gap = np.maximum(
        _line(on.a / on.period, 0.012, on.foot / on.period),
        _line(on.b / on.period, 0.012, on.foot / on.period),
    )
    across, up = (on.a / on.period) % 1.0, (on.b / on.period) % 1.0
    knob = np.hypot(across - 0.5, up - 0.5) < 0.05
    return (1.0 - 0.55 * gap) * np.where(knob, 0.45, 1.0)


def _painting(noise: Floats, on: _Patch) -> Floats:
    """Blots of three colours inside a frame."""
    frame = (np.abs(on.u) > 0.86) | (np.abs(on.v) > 0.86)
    shift = np.float64(3.1) * on.ids
    bands = np.stack(
        [value_noise(noise, 2.5 * on.u + shift + 11 * n, 2.5 * on.v + 5 * n) for n in range(3)]
    )
    tint = noise[on.ids % 64, 7]
    return np.where(frame, 0.12 + 0.5 * (tint > 0.6), 0.15 + 0.75 * bands)


def _screen(noise: Floats, on: _Patch) -> Floats:
    """Dark glass with a dim reflection, in a darker frame."""
    glass = (np.abs(on.u) < 0.95) & (np.abs(on.v) < 0.93)
    glint = 0.05 + 0.08 * value_noise(noise, 1.5 * on.u + on.ids, 1.5 * on.v) * (on.u + on.v > 0)
    return np.where(glass, glint, 0.02) * np.array([0.95, 1.0, 1.1])[:, None]


def _view(noise: Floats, on: _Patch) -> Floats:
    """Panes in a white frame; behind them a bright sky over something dark, or night."""
    bars = (np.abs(on.u) > 0.92) | (np.abs(on.v) > 0.93) | (np.abs(on.u) < 0.035)
    day = noise[on.ids % 64, 3] > 0.25
    land = on.v < -0.2 + 0.5 * (value_noise(noise, 3.0 * on.u + on.ids, 0.0 * on.v) - 0.5)
    sky = np.array([1.25, 1.4, 1.6])[:, None] * (0.9 + 0.3 * on.v)
    outside = np.where(land, np.array([0.45, 0.55, 0.35])[:, None], sky)
    outside = np.where(day, outside, np.array([0.05, 0.06, 0.09])[:, None])
    return np.where(bars, 0.85, outside)


_PAINT: Mapping[str, Callable[[Floats, _Patch], Floats]] = {
    "planks": _planks,
    "tiles": _tiles,
    "stripes": _stripes,
    "drawers": _drawers,
    "painting": _painting,
    "screen": _screen,
    "view": _view,
}
