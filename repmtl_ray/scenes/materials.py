"""The solids of a scene with their materials, and the colour of every visible point.

Owns textures and painted patterns, of streets and of rooms. The light on them belongs to `streets`
and `rooms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.scenes.raycast import Floats, Form, Hits, Solid, shadowed, value_noise

Rng: TypeAlias = np.random.Generator
Triple: TypeAlias = tuple[float, float, float]
"""A place or an extent in metres (x, y, z), or a colour in [0, 1] (red, green, blue)."""


class Look(NamedTuple):
    """How a solid's surface is coloured.

    Attributes:
        label: its class.
        colour: albedo in [0, 1].
        pattern: what is painted over the colour: a key of `PATTERNS`, or "plain".
        grain: metres between independent values of the coarsest texture noise.
        contrast: relative amplitude of that noise.
        period: metres; lane width of a road, width of a facade's window bay, size of planks, tiles,
            stripes and drawers.
        glass: lower and upper edge of a vehicle's window band, from -1 (bottom) to 1 (top).
    """

    label: int
    colour: Triple
    pattern: str = "plain"
    grain: float = 0.3
    contrast: float = 0.15
    period: float = 0.3
    glass: tuple[float, float] = (0.0, 0.0)


class Piece(NamedTuple):
    """A solid, its look, and whether its shadow is computed."""

    solid: Solid
    look: Look
    casts_shadow: bool = True


def part(
    look: Look,
    *,
    at: Triple,
    size: Triple,
    form: Form = "box",
    yaw: float = 0.0,
    ragged: float = 0.0,
    casts_shadow: bool = True,
) -> Piece:
    """A solid of full extent `size` that stands on the point `at`."""
    half = (size[0] / 2, size[1] / 2, size[2] / 2)
    centre = (at[0], at[1] + half[1], at[2])
    return Piece(Solid(form, centre, half, yaw, ragged), look, casts_shadow)


def pick(
    rng: Rng,
    colours: tuple[Triple, ...],
    spread: float = 0.04,
    *,
    darkest: float = 0.8,
    highest: float = 0.93,
) -> Triple:
    """One of the colours, varied.

    Args:
        rng: draws it.
        colours: to choose from.
        spread: standard deviation of each component.
        darkest: the smallest factor on the brightness; the largest is 1.15.
        highest: upper limit of every component.
    """
    colour = np.array(colours[rng.integers(len(colours))]) + rng.normal(0.0, spread, 3)
    return tuple(np.clip(colour * rng.uniform(darkest, 1.15), 0.03, highest).tolist())


def in_shadow(
    pieces: list[Piece],
    hits: Hits,
    facing: NDArray[np.bool_],
    direction: Floats,
    noise: Floats,
    *,
    lift: float,
) -> NDArray[np.intp]:
    """Indices of the points that some piece hides from the light.

    Args:
        pieces, hits, noise: the scene, its visible points and its [64, 64] noise table.
        facing: [points], which points to test.
        direction: [3], unit, towards the light.
        lift: metres by which the points are lifted off their surface.
    """
    index = np.flatnonzero(facing)
    casters = [piece.solid for piece in pieces if piece.casts_shadow]
    lifted = hits.points[:, index] + lift * hits.normals[:, index]
    return index[shadowed(lifted, direction, casters, noise)]


def surface_colours(pieces: list[Piece], hits: Hits, noise: Floats) -> Floats:
    """Albedo of every visible point, [3, points]; textures stick to the surface.

    Args:
        pieces: the scene.
        hits: its visible points; their dtype is the result's.
        noise: [64, 64] in [0, 1].
    """
    looks = [piece.look for piece in pieces]
    face = Face.of(looks, hits)
    colours = _of_points((look.colour for look in looks), hits)
    grain = _of_points((look.grain for look in looks), hits)
    contrast = _of_points((look.contrast for look in looks), hits)
    shift = np.float32(7.3) * hits.ids.astype(np.float32)  # two of a kind do not share stains
    for octave in (1.0, 0.4, 0.16):
        size = grain * octave
        fade = contrast * np.minimum(size / hits.footprint, 1.0)  # finer noise would flicker
        spots = value_noise(noise, face.along / size + shift, face.up / size + shift)
        colours *= 1.0 + 1.4 * fade * (spots - 0.5)
    for name, paint in PATTERNS.items():
        painted = np.flatnonzero(np.array([look.pattern == name for look in looks])[hits.ids])
        if painted.size:
            face = Face.of(looks, hits.at(painted))
            colours[:, painted] = paint(colours[:, painted], face, noise)
    return colours


def _of_points(values: Iterable[object], hits: Hits) -> Floats:
    """Values by solid as values by point, [..., points]."""
    return np.array(list(values), dtype=hits.points.dtype).T[..., hits.ids]


class Face(NamedTuple):
    """Points on the faces of solids, and what a pattern needs to know there.

    Attributes:
        hits: the points.
        along, up: metres across and up from the middle of the face that the point lies on.
        u, v: the same from -1 to 1.
        period: metres, as of a look.
        glass: [2, points], as of a look.
    """

    hits: Hits
    along: Floats
    up: Floats
    u: Floats
    v: Floats
    period: Floats
    glass: Floats

    @classmethod
    def of(cls, looks: list[Look], hits: Hits) -> Face:
        at_side, at_top = hits.axis == 0, hits.axis == 1
        (x, y, z), (wide, tall, deep) = hits.local, hits.half
        along, up = np.where(at_side, z, x), np.where(at_top, z, y)
        return cls(
            hits=hits,
            along=along,
            up=up,
            u=along / np.where(at_side, deep, wide),
            v=up / np.where(at_top, deep, tall),
            period=_of_points((look.period for look in looks), hits),
            glass=_of_points((look.glass for look in looks), hits),
        )

    def joints(self, place: Floats, width: float) -> Floats:
        """1 on a line at every whole period of `place` (metres), fading where a pixel is wider.

        Args:
            place: `along` or `up`.
            width: half of the line's width in periods.
        """
        periods, footprint = place / self.period, self.hits.footprint / self.period
        away = np.abs(periods - np.round(periods))
        footprint = np.maximum(footprint, 1e-6)
        cover: Floats = np.clip(0.5 + (width - away) / footprint, 0.0, 1.0)
        return cover * np.minimum(2.0 * width / footprint, 1.0)

    def grid(self, width: float) -> Floats:
        """`joints` in both directions."""
        return np.maximum(self.joints(self.along, width), self.joints(self.up, width))


def _column(*colour: float) -> NDArray[np.float32]:
    """[3, 1]."""
    return np.array(colour, dtype=np.float32)[:, None]


def _lanes(colours: Floats, face: Face, noise: Floats) -> Floats:
    """Dashes between lanes, worn by wheels; they keep their brightness where they are subpixel."""
    (x, _, z), lane, footprint = face.hits.points, face.period, face.hits.footprint
    aside = np.abs(x - lane * np.round(x / lane))
    cover = np.clip(0.5 + (0.08 - aside) / footprint, 0.0, np.minimum(0.16 / footprint, 1.0))
    cover *= (z % 9.0 < 4.0) | (np.abs(x) < lane / 2) & (z % 90.0 > 45.0)
    worn = colours * (1.0 - 0.08 * np.cos(4.0 * np.pi * x / lane))
    return worn + 0.9 * cover * (0.78 - worn)


def _facade(colours: Floats, face: Face, noise: Floats) -> Floats:
    """Panes in a grid, each with its own reflection, over a ground floor of another tone."""
    ids = face.hits.ids
    bays, storeys = face.along / face.period + 0.5, (face.up + face.hits.half[1]) / 3.0
    column, row = np.floor(bays).astype(np.intp), np.floor(storeys).astype(np.intp)
    across, up = bays - column, storeys - row
    wide = 0.2 + 0.15 * noise[ids % 64, 0]
    pane = (np.abs(across - 0.5) < wide) & (np.abs(up - 0.55) < 0.3)
    glint = noise[(row + 5 * ids) % 64, column % 64]
    toned = colours * np.where(storeys < 1.0, 0.6 + 0.7 * noise[ids % 64, 1], 1.0)
    glazed = np.where(pane, _column(0.10, 0.13, 0.16) + 0.45 * glint**3, toned)
    return np.where(face.hits.axis == 1, colours, glazed)


def _bodywork(colours: Floats, face: Face, noise: Floats, *, wheeled: bool) -> Floats:
    """Window bands, wheels, lamps and number plates of vehicles."""
    axis, local, half = face.hits.axis, face.hits.local, face.hits.half
    x, y, z = local / half
    pane = (axis != 1) & (y > face.glass[0]) & (y < face.glass[1]) & (np.abs(face.u) < 0.9)
    pane &= (axis == 2) | (np.abs((2.5 * z) % 1.0 - 0.5) < 0.44)  # pillars
    painted = np.where(pane, 0.12 + 0.12 * (y > 0.3), colours)
    if not wheeled:
        return painted
    hub = np.hypot(np.abs(local[2]) - 0.62 * half[2], local[1] + half[1] - 0.2)
    painted = np.where((axis == 0) & (hub < 0.34), 0.07 + 0.25 * (hub < 0.17), painted)
    level = local[1] + half[1]  # lamps sit at the height of a car's, also on a bus
    lamp = (axis == 2) & (np.abs(x) > 0.68) & (level > 0.35) & (level < 0.58)
    plate = (axis == 2) & (np.abs(x) < 0.28) & (level > 0.2) & (level < 0.34)
    lit = np.where(local[2] < 0, _column(0.55, 0.06, 0.05), 0.9)
    return np.where(plate, 0.8, np.where(lamp, lit, painted))


def _planks(colours: Floats, face: Face, noise: Floats) -> Floats:
    row = np.floor(face.along / face.period).astype(np.intp)
    board = np.floor(face.up / (face.period * 8) + 0.37 * row).astype(np.intp)
    tone = 0.85 + 0.3 * noise[row % 64, board % 64]
    return colours * (tone * (1.0 - 0.5 * face.joints(face.along, 0.02)))


def _tiles(colours: Floats, face: Face, noise: Floats) -> Floats:
    column = np.floor(face.along / face.period).astype(np.intp)
    row = np.floor(face.up / face.period).astype(np.intp)
    tone = 0.93 + 0.14 * noise[column % 64, row % 64]
    return colours * (tone * (1.0 - 0.35 * face.grid(0.02)))


def _stripes(colours: Floats, face: Face, noise: Floats) -> Floats:
    number = np.floor(face.along / face.period).astype(np.intp)
    fade = np.minimum(face.period / face.hits.footprint, 1.0)
    tone = noise[number % 64, (5 * face.hits.ids) % 64] - 0.5
    return colours * (1.0 + fade * (0.7 * tone - 0.4 * face.joints(face.along, 0.08)))


def _drawers(colours: Floats, face: Face, noise: Floats) -> Floats:
    across, up = (face.along / face.period) % 1.0, (face.up / face.period) % 1.0
    knob = np.hypot(across - 0.5, up - 0.5) < 0.05
    return colours * ((1.0 - 0.55 * face.grid(0.012)) * np.where(knob, 0.45, 1.0))


def _painting(colours: Floats, face: Face, noise: Floats) -> Floats:
    """Blots of three colours inside a frame."""
    frame = (np.abs(face.u) > 0.86) | (np.abs(face.v) > 0.86)
    shift = np.float64(3.1) * face.hits.ids
    bands = [
        value_noise(noise, 2.5 * face.u + shift + 11 * band, 2.5 * face.v + 5 * band)
        for band in range(3)
    ]
    tint = noise[face.hits.ids % 64, 7]
    picture = np.where(frame, 0.12 + 0.5 * (tint > 0.6), 0.15 + 0.75 * np.stack(bands))
    return np.where(face.hits.axis == 2, picture, colours)


def _screen(colours: Floats, face: Face, noise: Floats) -> Floats:
    """Dark glass with a dim reflection, in a darker frame."""
    glass = (np.abs(face.u) < 0.95) & (np.abs(face.v) < 0.93)
    reflection = value_noise(noise, 1.5 * face.u + face.hits.ids, 1.5 * face.v)
    glint = 0.05 + 0.08 * reflection * (face.u + face.v > 0)
    picture = np.where(glass, glint, 0.02) * np.array([0.95, 1.0, 1.1])[:, None]
    return np.where(face.hits.axis == 2, picture, colours)


def _window(colours: Floats, face: Face, noise: Floats) -> Floats:
    """Panes in a white frame; behind them a bright sky over something dark, or night."""
    ids, u, v = face.hits.ids, face.u, face.v
    bars = (np.abs(u) > 0.92) | (np.abs(v) > 0.93) | (np.abs(u) < 0.035)
    day = noise[ids % 64, 3] > 0.25
    land = v < -0.2 + 0.5 * (value_noise(noise, 3.0 * u + ids, 0.0 * v) - 0.5)
    sky = np.array([1.25, 1.4, 1.6])[:, None] * (0.9 + 0.3 * v)
    outside = np.where(land, np.array([0.45, 0.55, 0.35])[:, None], sky)
    outside = np.where(day, outside, np.array([0.05, 0.06, 0.09])[:, None])
    return np.where(face.hits.axis == 2, np.where(bars, 0.85, outside), colours)


PATTERNS: Mapping[str, Callable[[Floats, Face, Floats], Floats]] = {
    "road": _lanes,
    "facade": _facade,
    "vehicle": partial(_bodywork, wheeled=True),
    "cabin": partial(_bodywork, wheeled=False),
    "planks": _planks,
    "tiles": _tiles,
    "stripes": _stripes,
    "drawers": _drawers,
    "painting": _painting,
    "screen": _screen,
    "window": _window,
}
"""(colours [3, points], faces, noise) to the colours with the pattern."""
