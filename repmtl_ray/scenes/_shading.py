"""Light and texture of a ray-cast street.

Owns colour: the sun, the sky, haze, and what is painted on each surface. The camera's own errors
(exposure, noise) belong to `street_scenes`.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes._raycast import Floats, dot, shadowed, surface, value_noise
from repmtl_ray.scenes._street import FOCAL, PATTERNS, Piece

_SHADOW_RANGE = 200.0  # metres; farther, haze and pixel size hide what shadows would show


def shade(
    rng: np.random.Generator,
    pieces: list[Piece],
    noise: Floats,
    position: Floats,
    rays: Floats,
    metres: Floats,
    ids: NDArray[np.intp],
) -> Floats:
    """Light that reaches the camera: sun, shadows, sky and haze, all drawn from rng.

    Args:
        pieces: the street.
        noise: [64, 64] in [0, 1].
        position: [3], the camera's, metres.
        rays: [3, height, width], as from `camera_rays`.
        metres: [height, width], as from `trace`.
        ids: [height, width], as from `trace`.

    Returns:
        [3, height, width]; 1 is a white that an average exposure just keeps.
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

    noise = noise.astype(np.float32)
    radiance = np.empty(rays.shape, dtype=np.float32)
    width = rays.shape[-1]
    flat, rays, ids = radiance.reshape(3, -1), rays.reshape(3, -1), ids.reshape(-1)
    sky, seen = np.flatnonzero(ids < 0), np.flatnonzero(ids >= 0)
    flat[:, sky] = _sky(rays[:, sky], noise, haze, zenith, cloudy)
    ids, metres = ids[seen], metres.reshape(-1)[seen]
    points = (position[:, None] + metres * rays[:, seen]).astype(np.float32)
    metres = metres.astype(np.float32)
    local, axis, normals = surface([piece.solid for piece in pieces], ids, points)
    albedo = _albedo(pieces, noise, metres / (FOCAL * width), points, ids, local, axis)

    facing = np.maximum(dot(sun, normals), 0.0)
    if not overcast:
        casters = [piece.solid for piece in pieces if piece.casts_shadow]
        lit = np.flatnonzero((facing > 0.0) & (metres < _SHADOW_RANGE))
        dark = shadowed(points[:, lit] + 0.03 * normals[:, lit], sun, casters, noise)
        facing[lit[dark]] = 0.0
    warm = np.array([1.06, 1.0, 0.9], dtype=np.float32)[:, None]
    light = ambient * (0.8 + 0.2 * normals[1]) + strength * warm * facing
    clear = np.exp(metres / -visibility)
    flat[:, seen] = albedo * light * clear + haze[:, None] * (1.0 - clear)
    return radiance


def _sky(rays: Floats, noise: Floats, haze: Floats, zenith: Floats, cloudy: float) -> Floats:
    rise = np.clip(rays[1] / np.sqrt(dot(rays, rays)), 0.02, 1.0)
    a, b = rays[0] / (rise + 0.15), 1.0 / (rise + 0.15)
    cloud = 0.7 * value_noise(noise, 1.5 * a, 1.5 * b) + 0.3 * value_noise(noise, 5 * a, 5 * b)
    blue: Floats = haze[:, None] + (zenith - haze)[:, None] * np.minimum(rise * 2.5, 1.0)
    blue += cloudy * (cloud - 0.5)
    return blue


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
        return np.array(list(values), dtype=np.float32).T[..., at]

    colour = each(look.colour for look in looks)
    grain, contrast = each(look.grain for look in looks), each(look.contrast for look in looks)
    a, b = np.where(axis == 0, local[2], local[0]), np.where(axis == 1, local[2], local[1])
    speckle(colour, noise, grain, contrast, footprint, a, b, ids)

    pattern = np.array([PATTERNS.index(look.pattern) for look in looks])[ids]
    at = np.flatnonzero(pattern == PATTERNS.index("road"))
    lane = each((look.period for look in looks), ids[at])
    _paint_lanes(colour, at, points[0, at], points[2, at], lane, footprint[at])
    at = np.flatnonzero((pattern == PATTERNS.index("facade")) & (axis != 1))
    bay = each((look.period for look in looks), ids[at])
    above = b[at] + each((piece.solid.half[1] for piece in pieces), ids[at])
    _paint_windows(colour, at, noise, a[at], above, bay, ids[at])
    wheeled = pattern == PATTERNS.index("vehicle")
    at = np.flatnonzero(wheeled | (pattern == PATTERNS.index("cabin")))
    glass = each((look.glass for look in looks), ids[at])
    half = each((piece.solid.half for piece in pieces), ids[at])
    _paint_bodywork(colour, at, local[:, at], half, axis[at], glass, wheeled[at])
    return colour


def speckle(
    colour: Floats,
    noise: Floats,
    grain: Floats,
    contrast: Floats,
    footprint: Floats,
    a: Floats,
    b: Floats,
    ids: NDArray[np.intp],
) -> None:
    """Multiplies colours, [3, points], by noise in three octaves, fixed to the surface.

    Args:
        noise: [64, 64] in [0, 1].
        grain, contrast: [points], as of a look.
        footprint: [points], metres that a pixel spans; finer noise fades.
        a, b: [points], place on the surface, metres.
        ids: [points]; two of a kind must not share their stains.
    """
    shift = np.float32(7.3) * ids.astype(np.float32)
    for octave in (1.0, 0.4, 0.16):
        size = grain * octave
        fade = contrast * np.minimum(size / footprint, 1.0)
        spots = value_noise(noise, a / size + shift, b / size + shift)
        colour *= 1.0 + 1.4 * fade * (spots - 0.5)


def _paint_lanes(
    colour: Floats, at: NDArray[np.intp], x: Floats, z: Floats, lane: Floats, footprint: Floats
) -> None:
    """Dashes between lanes, worn by wheels in between; as wide as they are, also when subpixel."""
    aside = np.abs(x - lane * np.round(x / lane))
    cover = np.clip(0.5 + (0.08 - aside) / footprint, 0.0, np.minimum(0.16 / footprint, 1.0))
    cover *= (z % 9.0 < 4.0) | (np.abs(x) < lane / 2) & (z % 90.0 > 45.0)
    colour[:, at] *= 1.0 - 0.08 * np.cos(4.0 * np.pi * x / lane)
    colour[:, at] += 0.9 * cover * (0.78 - colour[:, at])


def _paint_windows(
    colour: Floats,
    at: NDArray[np.intp],
    noise: Floats,
    along: Floats,
    above: Floats,
    bay: Floats,
    ids: NDArray[np.intp],
) -> None:
    """Panes in a grid, each with its own reflection, over a ground floor of another tone."""
    bays, storeys = along / bay + 0.5, above / 3.0
    column, row = np.floor(bays).astype(np.intp), np.floor(storeys).astype(np.intp)
    across, up = bays - column, storeys - row
    wide = 0.2 + 0.15 * noise[ids % 64, 0]
    pane = (np.abs(across - 0.5) < wide) & (np.abs(up - 0.55) < 0.3)
    glint = noise[(row + 5 * ids) % 64, column % 64]
    colour[:, at] *= np.where(storeys < 1.0, 0.6 + 0.7 * noise[ids % 64, 1], 1.0)
    glass = np.array([0.10, 0.13, 0.16], dtype=np.float32)[:, None] + 0.45 * glint**3
    colour[:, at] = np.where(pane, glass, colour[:, at])


def _paint_bodywork(
    colour: Floats,
    at: NDArray[np.intp],
    local: Floats,
    half: Floats,
    axis: NDArray[np.intp],
    glass: Floats,
    wheeled: NDArray[np.bool_],
) -> None:
    """Window bands, wheels, lamps and number plates of vehicles."""
    x, y, z = local / half
    along = np.where(axis == 0, z, x)
    pane = (axis != 1) & (y > glass[0]) & (y < glass[1]) & (np.abs(along) < 0.9)
    pane &= (axis == 2) | (np.abs((2.5 * z) % 1.0 - 0.5) < 0.44)  # pillars
    hub = np.hypot(np.abs(local[2]) - 0.62 * half[2], local[1] + half[1] - 0.2)
    tyre = wheeled & (axis == 0) & (hub < 0.34)
    level = local[1] + half[1]  # lamps sit at the height of a car's, also on a bus
    lamp = wheeled & (axis == 2) & (np.abs(x) > 0.68) & (level > 0.35) & (level < 0.58)
    plate = wheeled & (axis == 2) & (np.abs(x) < 0.28) & (level > 0.2) & (level < 0.34)
    paint = np.where(pane, 0.12 + 0.12 * (y > 0.3), 1.0)
    paint = np.where(tyre, 0.07 + 0.25 * (hub < 0.17), paint)
    marked = np.flatnonzero(pane | tyre)
    colour[:, at[marked]] = paint[marked]
    rear = np.array([0.55, 0.06, 0.05], dtype=np.float32)[:, None]
    colour[:, at] = np.where(lamp, np.where(local[2] < 0, rear, 0.9), colour[:, at])
    colour[:, at] = np.where(plate, 0.8, colour[:, at])
