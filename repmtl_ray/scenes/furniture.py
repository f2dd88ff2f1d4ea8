"""Furniture of rooms: the solids that a bed, a bookcase or a chair consists of, and their looks.

Owns single items, each drawn from a random generator. `room_layout` decides where they stand. Lengths
are in metres. An item stands on y = 0 with its back at z = 0 and its front towards -z.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from repmtl_ray.scenes.materials import Look, Piece, Rng, Triple, part, pick
from repmtl_ray.scenes.raycast import Form

BED, BOOKS, CEILING, CHAIR, FLOOR, FURNITURE, OBJECTS = range(7)
PICTURE, SOFA, TABLE, TV, WALL, WINDOW = range(7, 13)

WOOD: tuple[Triple, ...] = (
    (0.45, 0.30, 0.18), (0.60, 0.44, 0.28), (0.30, 0.20, 0.13), (0.70, 0.57, 0.40),
    (0.82, 0.80, 0.76), (0.20, 0.19, 0.19),
)  # fmt: skip
# Beds, sofas and chairs share these colours, so that the colour does not tell which one it is.
CLOTH: tuple[Triple, ...] = (
    (0.55, 0.50, 0.42), (0.30, 0.34, 0.45), (0.50, 0.22, 0.20), (0.76, 0.73, 0.67),
    (0.25, 0.33, 0.26), (0.35, 0.28, 0.24), (0.62, 0.58, 0.60), (0.24, 0.24, 0.27),
)  # fmt: skip
PAINT: tuple[Triple, ...] = (
    (0.80, 0.77, 0.70), (0.72, 0.74, 0.72), (0.78, 0.70, 0.58), (0.62, 0.68, 0.72),
    (0.70, 0.60, 0.55), (0.84, 0.83, 0.80),
)  # fmt: skip
BRIGHT: tuple[Triple, ...] = (
    (0.65, 0.20, 0.16), (0.16, 0.30, 0.52), (0.78, 0.66, 0.24), (0.20, 0.42, 0.28),
    (0.82, 0.80, 0.76), (0.16, 0.16, 0.17), (0.50, 0.28, 0.42), (0.72, 0.45, 0.20),
)  # fmt: skip


Item: TypeAlias = list[Piece]
"""Pieces around the origin, front towards -z, back at the item's own largest z."""
Make: TypeAlias = Callable[[Rng], Item]


def turned(item: Item, *, at: Triple, yaw: float) -> Item:
    """An item moved to a point and turned about the vertical there."""
    sin, cos = np.sin(yaw), np.cos(yaw)
    moved = []
    for piece in item:
        x, y, z = piece.solid.centre
        centre = (at[0] + cos * x + sin * z, at[1] + y, at[2] + cos * z - sin * x)
        solid = piece.solid._replace(centre=centre, yaw=piece.solid.yaw + yaw)
        moved.append(piece._replace(solid=solid))
    return moved


def extent(item: Item) -> tuple[float, float]:
    """Width and depth of an item that is not turned and whose back is at z = 0."""
    wide = max(abs(p.solid.centre[0]) + p.solid.half[0] for p in item)
    deep = max(p.solid.half[2] - p.solid.centre[2] for p in item)
    return 2 * wide, deep


def _legs(look: Look, wide: float, deep: float, tall: float, *, front: float) -> Iterator[Piece]:
    for x in (-wide / 2 + 0.04, wide / 2 - 0.04):
        for z in (front + 0.04, front + deep - 0.04):
            yield part(look, at=(x, 0.0, z), size=(0.05, tall, 0.05))


def bed(rng: Rng) -> Item:
    wide, deep, tall = rng.uniform(1.0, 1.8), rng.uniform(1.9, 2.1), rng.uniform(0.42, 0.6)
    sheet = Look(BED, pick(rng, CLOTH), grain=0.2, contrast=rng.uniform(0.05, 0.4))
    frame = Look(BED, pick(rng, WOOD), grain=0.15, contrast=0.2)
    pillow = sheet._replace(colour=pick(rng, CLOTH), contrast=0.08)
    item = [
        part(frame, at=(0.0, 0.08, -deep / 2), size=(wide, tall - 0.28, deep)),
        part(sheet, at=(0.0, tall - 0.2, -deep / 2), size=(wide - 0.04, 0.2, deep - 0.04)),
        part(frame, at=(0.0, 0.0, -0.03), size=(wide, tall + rng.uniform(0.2, 0.6), 0.06)),
    ]
    for x in (-wide / 4, wide / 4) if wide > 1.3 else (0.0,):
        at = (x, tall - 0.02, -0.35)
        item.append(part(pillow, at=at, size=(0.6, 0.2, 0.4), form="ellipsoid"))
    return item


def sofa(rng: Rng) -> Item:
    wide, deep = rng.uniform(1.5, 2.3), rng.uniform(0.8, 0.95)
    return _seat(rng, wide, deep, SOFA)


def armchair(rng: Rng) -> Item:
    return _seat(rng, rng.uniform(0.75, 0.95), rng.uniform(0.75, 0.9), CHAIR)


def _seat(rng: Rng, wide: float, deep: float, label: int) -> Item:
    cloth = Look(label, pick(rng, CLOTH), grain=0.1, contrast=rng.uniform(0.05, 0.25))
    cushion = cloth._replace(colour=pick(rng, (cloth.colour,), 0.06))
    seat, back, arm = rng.uniform(0.38, 0.46), rng.uniform(0.75, 0.95), rng.uniform(0.12, 0.2)
    item = [
        part(cloth, at=(0.0, 0.05, -deep / 2), size=(wide, seat - 0.17, deep)),
        part(cloth, at=(0.0, 0.05, -0.1), size=(wide, back - 0.05, 0.2)),
    ]
    for x in (-wide / 2 + arm / 2, wide / 2 - arm / 2):
        item.append(part(cloth, at=(x, 0.05, -deep / 2), size=(arm, seat + 0.12, deep)))
    num_cushions = max(1, round((wide - 2 * arm) / 0.7))
    each = (wide - 2 * arm) / num_cushions
    for number in range(num_cushions):
        x = -wide / 2 + arm + each * (number + 0.5)
        size = (each - 0.02, 0.14, deep - 0.24)
        item.append(part(cushion, at=(x, seat - 0.12, -0.2 - size[2] / 2), size=size))
    return item


def chair(rng: Rng) -> Item:
    wide, seat, back = rng.uniform(0.4, 0.5), rng.uniform(0.42, 0.5), rng.uniform(0.8, 1.0)
    wood = Look(CHAIR, pick(rng, WOOD), grain=0.1, contrast=0.2)
    cover = Look(CHAIR, pick(rng, CLOTH + WOOD), grain=0.1, contrast=0.15)
    return [
        part(cover, at=(0.0, seat - 0.05, -wide / 2), size=(wide, 0.05, wide)),
        part(cover, at=(0.0, seat + 0.1, -0.02), size=(wide, back - seat - 0.1, 0.04)),
        *_legs(wood, wide, wide, seat - 0.05, front=-wide),
        part(wood, at=(-wide / 2 + 0.03, seat, -0.02), size=(0.04, 0.12, 0.04)),
        part(wood, at=(wide / 2 - 0.03, seat, -0.02), size=(0.04, 0.12, 0.04)),
    ]


def table(rng: Rng, *, low: bool) -> Item:
    wide, deep = rng.uniform(0.8, 1.4), rng.uniform(0.5, 0.9)
    tall = rng.uniform(0.35, 0.45) if low else rng.uniform(0.7, 0.78)
    wood = Look(TABLE, pick(rng, WOOD), grain=0.12, contrast=0.2)
    item = [
        part(wood, at=(0.0, tall - 0.04, 0.0), size=(wide, 0.04, deep)),
        *_legs(wood, wide, deep, tall - 0.04, front=-deep / 2),
    ]
    return item + _on_top(rng, wide, tall, (-deep / 3, deep / 3), int(rng.integers(0, 4)))


def desk(rng: Rng) -> Item:
    wide, deep, tall = rng.uniform(1.0, 1.6), rng.uniform(0.55, 0.75), rng.uniform(0.7, 0.78)
    wood = Look(TABLE, pick(rng, WOOD), grain=0.12, contrast=0.2)
    item = [
        part(wood, at=(0.0, tall - 0.04, -deep / 2), size=(wide, 0.04, deep)),
        *_legs(wood, wide, deep, tall - 0.04, front=-deep),
        *_on_top(rng, wide, tall, (-deep + 0.1, -0.12), int(rng.integers(2, 5))),
    ]
    if rng.random() < 0.7:
        at = (rng.uniform(-0.25, 0.25) * wide, 0.0, -deep - rng.uniform(0.0, 0.2))
        item += turned(chair(rng), at=at, yaw=np.pi + rng.normal(0.0, 0.3))
    return item


def wardrobe(rng: Rng) -> Item:
    return _cabinet(rng, (rng.uniform(0.9, 1.8), rng.uniform(1.8, 2.15), rng.uniform(0.5, 0.65)))


def cupboard(rng: Rng) -> Item:
    size = (rng.uniform(0.7, 1.6), rng.uniform(0.7, 1.1), rng.uniform(0.4, 0.55))
    deep = (-size[2] + 0.1, -0.1)
    return _cabinet(rng, size) + _on_top(rng, size[0], size[1], deep, int(rng.integers(1, 5)))


def _cabinet(rng: Rng, size: Triple) -> Item:
    look = Look(
        FURNITURE,
        pick(rng, WOOD),
        "drawers",
        grain=rng.uniform(0.1, 0.3),
        contrast=rng.uniform(0.05, 0.25),
        period=rng.uniform(0.22, 0.55),
    )
    return [part(look, at=(0.0, 0.0, -size[2] / 2), size=size)]


def media(rng: Rng) -> Item:
    """A low cabinet with a television."""
    size = (rng.uniform(1.1, 1.8), rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.5))
    wide = rng.uniform(0.7, 1.05) * min(size[0], 1.2)
    screen = Look(TV, (0.03, 0.03, 0.035), "screen", contrast=0.1)
    stand = Look(TV, (0.06, 0.06, 0.06), contrast=0.12)
    return [
        *_cabinet(rng, size),
        part(stand, at=(0.0, size[1], -size[2] / 2), size=(0.3, 0.05, 0.2)),
        part(screen, at=(0.0, size[1] + 0.05, -size[2] / 2), size=(wide, 0.57 * wide, 0.05)),
    ]


def shelf(rng: Rng) -> Item:
    """A bookcase: sides, boards, and books and things on them."""
    wide, deep, tall = rng.uniform(0.7, 1.4), rng.uniform(0.25, 0.35), rng.uniform(1.2, 2.0)
    wood = Look(FURNITURE, pick(rng, WOOD), grain=0.12, contrast=0.2)
    item = [part(wood, at=(0.0, 0.0, -0.01), size=(wide, tall, 0.02))]
    for x in (-wide / 2 + 0.015, wide / 2 - 0.015):
        item.append(part(wood, at=(x, 0.0, -deep / 2), size=(0.03, tall, deep)))
    num_boards = int(tall / 0.36) + 1
    for y in np.linspace(0.05, tall - 0.03, num_boards).tolist():
        item.append(part(wood, at=(0.0, y, -deep / 2), size=(wide, 0.03, deep)))
        if y > tall - 0.1:
            break
        if rng.random() < 0.75:
            item += _books(rng, wide - 0.08, y + 0.03, deep)
        else:
            item += _on_top(rng, wide - 0.1, y + 0.03, (-deep + 0.12, -0.12), 2, tallest=0.24)
    return item


def _books(rng: Rng, wide: float, y: float, deep: float) -> Iterator[Piece]:
    """A few blocks of books of one height, each with the stripes of its spines."""
    x = -wide / 2
    while x < wide / 2 - 0.08:
        run = min(rng.uniform(0.08, 0.3), wide / 2 - x)
        look = Look(
            BOOKS,
            pick(rng, BRIGHT),
            "stripes",
            grain=0.06,
            contrast=0.3,
            period=rng.uniform(0.025, 0.05),
        )
        size = (run, rng.uniform(0.16, 0.27), deep * rng.uniform(0.55, 0.8))
        yield part(look, at=(x + run / 2, y, -0.02 - size[2] / 2), size=size)
        x += run + 0.002 + rng.uniform(0.0, 0.15) * (rng.random() < 0.3)


def _on_top(
    rng: Rng, wide: float, y: float, z_range: tuple[float, float], number: int, tallest: float = 0.4
) -> Item:
    """Things, and sometimes books, on a board."""
    item = []
    for place in rng.permutation(5)[:number]:
        x = wide * (0.18 * (place - 2) + rng.uniform(-0.03, 0.03))
        z = rng.uniform(*z_range)
        if rng.random() < 0.3:
            look = Look(BOOKS, pick(rng, BRIGHT), grain=0.05, contrast=0.2)
            size = (0.15, rng.uniform(0.03, 0.12), 0.21)
            item.append(part(look, at=(x, y, z), size=size))
        else:
            item += turned([thing(rng, rng.uniform(0.1, tallest))], at=(x, y, z), yaw=0.0)
    return item


def thing(rng: Rng, tall: float) -> Piece:
    """A box, a ball or a tin."""
    look = Look(OBJECTS, pick(rng, BRIGHT), grain=0.06, contrast=rng.uniform(0.1, 0.4))
    wide = min(tall * rng.uniform(0.5, 1.0), 0.2)
    form: Form = ("box", "ellipsoid")[rng.integers(2)]
    return part(look, at=(0.0, 0.0, 0.0), size=(wide, tall, wide), form=form)


def plant(rng: Rng) -> Item:
    """A pot with leaves, or a standard lamp."""
    pot = Look(OBJECTS, pick(rng, BRIGHT), grain=0.1, contrast=0.1)
    if rng.random() < 0.5:
        leaves = Look(OBJECTS, (0.16, 0.30, 0.12), grain=0.06, contrast=0.6)
        tall = rng.uniform(0.4, 0.9)
        return [
            part(pot, at=(0.0, 0.0, -0.2), size=(0.28, 0.3, 0.28)),
            part(leaves, at=(0.0, 0.22, -0.3), size=(0.55, tall, 0.55), form="ellipsoid"),
        ]
    shade = Look(OBJECTS, (0.88, 0.80, 0.64), grain=0.2, contrast=0.05)
    tall = rng.uniform(1.2, 1.6)
    return [
        part(pot, at=(0.0, 0.0, -0.2), size=(0.26, 0.03, 0.26)),
        part(pot, at=(0.0, 0.03, -0.2), size=(0.03, tall, 0.03)),
        part(shade, at=(0.0, tall, -0.2), size=(0.38, 0.28, 0.38), form="ellipsoid"),
    ]


EVERY: tuple[Make, ...] = (
    *(bed, sofa, wardrobe, cupboard, shelf),
    *(desk, media, chair, armchair, plant),
)
"""All that may stand at a wall."""
