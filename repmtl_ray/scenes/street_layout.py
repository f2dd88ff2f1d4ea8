"""Random streets: which solids stand where, and how each looks.

Owns the layout of a street; the picture is made in `streets`. Lengths in metres, traffic on the
right, z along the street.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from repmtl_ray.scenes.materials import Look, Piece, Rng, Triple, part, pick
from repmtl_ray.scenes.raycast import Camera

FLAT, HUMAN, VEHICLE, CONSTRUCTION, OBJECT, NATURE, SKY = range(7)
FOCAL = 2262.5 / 2048  # image widths, as the Cityscapes camera

_pick = partial(pick, darkest=0.85, highest=0.95)

# Walls and vehicles share these colours, so that the colour does not tell a house from a lorry.
_PAINTS: tuple[Triple, ...] = (
    (0.62, 0.58, 0.50), (0.70, 0.68, 0.64), (0.55, 0.34, 0.27), (0.46, 0.42, 0.40),
    (0.75, 0.70, 0.56), (0.34, 0.35, 0.37), (0.60, 0.48, 0.38), (0.40, 0.46, 0.52),
    (0.50, 0.20, 0.17), (0.82, 0.81, 0.79), (0.22, 0.23, 0.25), (0.28, 0.34, 0.46),
)  # fmt: skip
_LEAVES: tuple[Triple, ...] = (
    (0.20, 0.30, 0.11), (0.27, 0.36, 0.14), (0.17, 0.26, 0.14), (0.38, 0.34, 0.15),
)  # fmt: skip
_SIGNS: tuple[Triple, ...] = (
    (0.12, 0.25, 0.60), (0.72, 0.14, 0.13), (0.85, 0.76, 0.20), (0.85, 0.85, 0.85),
    (0.16, 0.18, 0.17), (0.15, 0.42, 0.25),
)  # fmt: skip
_SKINS: tuple[Triple, ...] = ((0.78, 0.60, 0.50), (0.62, 0.45, 0.34), (0.40, 0.28, 0.21))


class _Plan(NamedTuple):
    """The cross-section of a street; distances from its middle, and densities in [0, 1]."""

    lane: float
    kerb: float
    front: float  # the facades
    garden: float  # width of the strip before the facades
    parking: bool
    parked: float
    green: float
    tall: float  # usual height of a building, metres


def street(rng: Rng) -> tuple[Camera, list[Piece]]:
    """A random street and the camera of a car that drives along it."""
    lane, lanes, parking = rng.uniform(3.0, 3.7), int(rng.integers(1, 3)), bool(rng.random() < 0.75)
    kerb = lane * lanes + 2.3 * parking
    green = rng.random()
    garden = rng.uniform(1.0, 5.0) * (green > 0.5)
    plan = _Plan(
        lane=lane,
        kerb=kerb,
        front=kerb + rng.uniform(2.5, 4.5) + garden,
        garden=garden,
        parking=parking,
        parked=rng.uniform(0.2, 0.9),
        green=green,
        tall=rng.uniform(7.0, 18.0),
    )
    camera = Camera(
        lateral=lane * (rng.integers(lanes) + 0.5) + np.clip(rng.normal(0.0, 0.25), -0.5, 0.5),
        height=rng.uniform(1.1, 1.5),
        yaw=rng.normal(0.0, 0.035),
        pitch=rng.uniform(0.01, 0.07),
        focal=FOCAL,
    )
    pieces = [*_ground(rng, plan), *_street_end(rng, plan), *_traffic(rng, plan)]
    for side in (-1, 1):
        pieces += _buildings(rng, plan, side)
        pieces += _plants(rng, plan, side)
        pieces += _furniture(rng, plan, side)
    return camera, pieces + list(_people(rng, plan))


def _ground(rng: Rng, plan: _Plan) -> Iterator[Piece]:
    grey = rng.uniform(0.26, 0.42)
    road = Look(FLAT, (grey, grey, grey * 1.03), "road", 0.5, 0.12, plan.lane)
    yield part(road, at=(0, -1, 1000), size=(200, 1, 2100), casts_shadow=False)
    paving = Look(FLAT, _pick(rng, ((0.50, 0.48, 0.45), (0.42, 0.41, 0.42))), grain=0.7)
    grass = Look(NATURE, _pick(rng, _LEAVES), grain=0.4, contrast=0.35)
    for side in (-1, 1):
        at = (side * (plan.kerb + 50), -0.1, 1000)
        yield part(paving, at=at, size=(100, 0.22, 2100), casts_shadow=False)
        if plan.garden:
            at = (side * (plan.front - plan.garden / 2), 0, 90)
            size = (plan.garden, 0.16, 220)
            yield part(grass, at=at, size=size, casts_shadow=False)


def _street_end(rng: Rng, plan: _Plan) -> Iterator[Piece]:
    """What closes the view: a building across, trees, or nothing."""
    end, choice = rng.uniform(90.0, 200.0), rng.random()
    if choice < 0.35:
        yield _building(rng, x=rng.normal(0, 10), z=end, size=(60.0, plan.tall, 12.0))
    elif choice < 0.85:
        for x in np.arange(-40.0, 41.0, 11.0) + rng.normal(0.0, 3.0, 8):
            yield _foliage(rng, at=(float(x), 0.0, end), radius=rng.uniform(5.0, 9.0))


def _building(rng: Rng, *, x: float, z: float, size: Triple) -> Piece:
    look = Look(
        CONSTRUCTION,
        _pick(rng, _PAINTS),
        "facade",
        grain=rng.uniform(0.5, 2.0),
        contrast=rng.uniform(0.05, 0.2),
        period=rng.uniform(1.8, 3.6),
    )
    return part(look, at=(x, 0.0, z), size=size)


def _buildings(rng: Rng, plan: _Plan, side: int) -> Iterator[Piece]:
    z = rng.uniform(-14.0, -4.0)
    while z < 130.0:
        length = rng.uniform(8.0, 24.0)
        if rng.random() < 0.08 + 0.35 * plan.green:
            if rng.random() < 0.3 + 0.6 * plan.green:  # a park or yard in the gap
                at = (side * (plan.front + rng.uniform(4.0, 9.0)), 0.0, z + length / 2)
                yield _foliage(rng, at=at, radius=rng.uniform(3.0, 5.5))
        else:
            deep, tall = rng.uniform(9.0, 15.0), max(3.5, plan.tall + rng.normal(0.0, 2.5))
            x = side * (plan.front + deep / 2 + rng.uniform(0.0, 0.8))
            yield _building(rng, x=x, z=z + length / 2, size=(deep, tall, length))
        z += length
    if plan.garden:  # a hedge, or a garden wall
        tall, at = rng.uniform(0.6, 1.6), (side * (plan.front - plan.garden), 0.0, 60.0)
        if rng.random() < 0.6:
            look = Look(NATURE, _pick(rng, _LEAVES), grain=0.35, contrast=0.5)
        else:
            look = Look(CONSTRUCTION, _pick(rng, _PAINTS), grain=0.6, contrast=0.2)
        yield part(look, at=at, size=(0.5, tall, 110.0))


def _foliage(rng: Rng, *, at: Triple, radius: float) -> Piece:
    size = tuple((2.0 * radius * rng.uniform(0.8, 1.2, 3)).tolist())
    look = Look(NATURE, _pick(rng, _LEAVES), grain=0.25 + 0.1 * radius, contrast=0.6)
    return part(look, at=at, size=size, ragged=rng.uniform(0.5, 0.9), form="ellipsoid")


def _plants(rng: Rng, plan: _Plan, side: int) -> Iterator[Piece]:
    spacing, z = rng.uniform(8.0, 18.0) / (0.4 + plan.green), rng.uniform(6.0, 16.0)
    bark = Look(NATURE, _pick(rng, ((0.30, 0.24, 0.18), (0.36, 0.33, 0.29))), grain=0.2)
    while z < 70.0:
        if rng.random() < 0.4 + 0.5 * plan.green:
            x = side * (plan.kerb + rng.uniform(0.7, 1.2) + plan.garden * (rng.random() < 0.5))
            trunk, girth = rng.uniform(2.0, 3.2), rng.uniform(0.2, 0.5)
            radius = rng.uniform(1.3, 2.5)
            yield part(bark, at=(x, 0, z), size=(girth, trunk + radius, girth), form="cylinder")
            yield _foliage(rng, at=(x, trunk, z), radius=radius)
            if rng.random() < 0.6:
                at = (x + rng.normal(0, 0.6), trunk + rng.uniform(0.6, 1.6), z + rng.normal(0, 0.8))
                yield _foliage(rng, at=at, radius=0.8 * radius)
        z += spacing * rng.uniform(0.7, 1.3)


def _furniture(rng: Rng, plan: _Plan, side: int) -> Iterator[Piece]:
    """Lamps, traffic lights and signs at the kerb."""
    steel = Look(OBJECT, _pick(rng, ((0.34, 0.35, 0.36), (0.48, 0.48, 0.47))), grain=0.3)
    z = rng.uniform(7.0, 18.0)
    while z < 65.0:
        x, kind = side * (plan.kerb + rng.uniform(0.35, 0.6)), rng.random()
        tall = rng.uniform(5.5, 8.0) if kind < 0.4 else rng.uniform(2.6, 3.6)
        girth = rng.uniform(0.12, 0.22)
        yield part(steel, at=(x, 0, z), size=(girth, tall, girth), form="cylinder")
        board = Look(OBJECT, _pick(rng, _SIGNS), grain=0.2, contrast=0.3)
        if kind < 0.4:  # a lamp on an arm over the road
            at = (x - side * 0.9, tall - 0.12, z)
            yield part(steel, at=at, size=(1.9, 0.16, 0.3), casts_shadow=False)
        elif kind < 0.6:  # a traffic light
            at = (x, tall - 1.0, z - girth)
            yield part(board, at=at, size=(0.38, 1.0, 0.3), casts_shadow=False)
        else:
            size = (rng.uniform(0.6, 1.1), rng.uniform(0.6, 1.0), 0.06)
            at = (x, tall - size[1], z - girth)
            yield part(board, at=at, size=size, casts_shadow=False)
        z += rng.uniform(7.0, 22.0)


def _traffic(rng: Rng, plan: _Plan) -> Iterator[Piece]:
    for side in (-1, 1):
        if plan.parking:
            z = rng.uniform(5.0, 12.0)
            while z < 60.0:
                if rng.random() < plan.parked:
                    yield from _vehicle(rng, x=side * (plan.kerb - 1.1), z=z, parked=True)
                z += rng.uniform(5.6, 7.5)
        for number in range(int((plan.kerb - 2.3 * plan.parking) / plan.lane + 0.5)):
            z = rng.uniform(9.0, 30.0)
            for _ in range(rng.integers(0, 3)):
                x = side * plan.lane * (number + 0.5) + rng.normal(0.0, 0.15)
                yield from _vehicle(rng, x=x, z=z, parked=False)
                z += rng.uniform(13.0, 35.0)


def _vehicle(rng: Rng, *, x: float, z: float, parked: bool) -> Iterator[Piece]:
    paint = _pick(rng, _PAINTS)
    yaw = rng.normal(0.0, 0.03) + np.pi * (x < 0)  # oncoming on the left
    kind = rng.random()
    body = Look(VEHICLE, paint, "vehicle", grain=1.5, contrast=0.06)
    if kind < 0.8 or (parked and kind > 0.93):
        wide, tall, long = rng.uniform(1.65, 1.9), rng.uniform(0.62, 0.8), rng.uniform(3.7, 4.7)
        yield part(body, at=(x, 0.15, z), size=(wide, tall, long), yaw=yaw)
        cabin = body._replace(pattern="cabin", glass=(-0.85, 0.75))
        size = (wide * 0.88, rng.uniform(0.48, 0.62), long * rng.uniform(0.5, 0.65))
        at = (x, 0.15 + tall, z - rng.uniform(0.0, 0.08) * long)
        yield part(cabin, at=at, size=size, yaw=yaw)
    elif kind < 0.93:  # a van
        size = (rng.uniform(1.8, 2.0), rng.uniform(1.6, 2.2), rng.uniform(4.6, 5.4))
        body = body._replace(glass=(0.15, 0.75))
        yield part(body, at=(x, 0.18, z), size=size, yaw=yaw)
    else:  # a bus or lorry
        size = (2.45, rng.uniform(2.7, 3.3), rng.uniform(7.0, 11.0))
        body = body._replace(glass=(0.0, 0.65) if rng.random() < 0.5 else (0.0, 0.0))
        yield part(body, at=(x, 0.3, z + 3.0), size=size, yaw=yaw)


def _people(rng: Rng, plan: _Plan) -> Iterator[Piece]:
    for _ in range(3 + rng.poisson(5.0)):
        z, wide = 6.0 + 34.0 * rng.random() ** 1.7, plan.front - plan.garden - plan.kerb
        x = rng.choice((-1, 1)) * (plan.kerb + rng.uniform(0.5, max(0.6, wide - 0.5)))
        if rng.random() < 0.15:  # someone crosses
            x = rng.uniform(-plan.kerb, plan.kerb)
        tall, yaw, stride = rng.uniform(1.5, 1.95), rng.uniform(0.0, np.pi), rng.uniform(0.05, 0.2)
        coat = Look(HUMAN, _pick(rng, _PAINTS + _SIGNS), grain=0.25, contrast=0.25)
        trousers = Look(HUMAN, _pick(rng, _PAINTS), grain=0.25, contrast=0.2)
        skin = Look(HUMAN, _pick(rng, _SKINS), grain=0.8, contrast=0.1)
        size = (0.52 * tall / 1.75, 0.42 * tall, 0.34)
        yield part(coat, at=(x, 0.45 * tall, z), size=size, yaw=yaw, form="ellipsoid")
        size = (0.2, 0.15 * tall, 0.22)
        yield part(skin, at=(x, 0.85 * tall, z), size=size, casts_shadow=False, form="ellipsoid")
        for leg in (-stride, stride) if z < 20.0 else (0.0,):
            at = (x + leg * np.cos(yaw), 0.0, z - leg * np.sin(yaw))
            size = (0.19, 0.56 * tall, 0.19)
            yield part(trousers, at=at, size=size, casts_shadow=False, form="ellipsoid")
