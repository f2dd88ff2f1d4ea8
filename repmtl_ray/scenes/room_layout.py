"""Random rooms: which furniture stands where.

Owns the layout of a room; single pieces are in `furniture`, the picture is made in `rooms`. Lengths
in metres. The room's floor is at y = 0; the camera stands at z = 0 near the middle of one wall and
looks along z.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from repmtl_ray.scenes import furniture as made
from repmtl_ray.scenes.furniture import (
    BRIGHT,
    CEILING,
    CLOTH,
    FLOOR,
    PAINT,
    PICTURE,
    TV,
    WALL,
    WINDOW,
    WOOD,
    Item,
    extent,
    turned,
)  # fmt: skip
from repmtl_ray.scenes.materials import Look, Piece, Rng, part, pick
from repmtl_ray.scenes.raycast import Camera

FOCAL = 518.8579 / 640  # image widths, as the colour camera of NYUv2


class Room(NamedTuple):
    """A box of air, in metres.

    Attributes:
        width, depth, height: along x, z and y.
        left: x of its left wall.
        near: z of the wall behind the camera, below 0.
    """

    width: float
    depth: float
    height: float
    left: float
    near: float


def interior(rng: Rng) -> tuple[Camera, Room, list[Piece]]:
    """A random room with its furniture, and a camera in it."""
    width, depth, height = rng.uniform(3.0, 5.5), rng.uniform(3.2, 6.0), rng.uniform(2.3, 3.0)
    near = -rng.uniform(0.25, 0.6)
    room = Room(width, depth, height, -width / 2, near)
    camera = Camera(
        lateral=width * rng.uniform(-0.25, 0.25),
        height=rng.uniform(1.1, 1.7),
        yaw=rng.normal(0.0, 0.35),
        pitch=rng.uniform(0.02, 0.4),
        focal=FOCAL,
    )
    pieces = list(_shell(rng, room))
    taken = [(camera.lateral - 0.5, camera.lateral + 0.5, near, 0.9)]  # x from, to; z from, to
    for kind in _programme(rng):
        _along_a_wall(rng, room, kind, pieces, taken)
    _in_the_middle(rng, room, pieces, taken)
    hung: list[tuple[int, float, float]] = []  # wall, and from where to where along it
    for _ in range(1 + rng.poisson(2.0)):
        _on_a_wall(rng, room, pieces, hung)
    return camera, room, pieces


def _shell(rng: Rng, room: Room) -> Iterator[Piece]:
    """Floor, ceiling and walls: slabs around the air."""
    middle, thick = room.near + room.depth / 2, 0.5
    floor = Look(
        FLOOR,
        pick(rng, WOOD + CLOTH),
        ("planks", "tiles", "plain")[rng.integers(3)],
        grain=rng.uniform(0.05, 0.4),
        contrast=rng.uniform(0.05, 0.25),
        period=rng.uniform(0.12, 0.45),
    )
    size = (room.width + 2 * thick, thick, room.depth + 2 * thick)
    centre = room.left + room.width / 2
    yield part(floor, at=(centre, -thick, middle), size=size)._replace(casts_shadow=False)
    white = Look(CEILING, pick(rng, PAINT[:2]), grain=0.8, contrast=0.03)
    yield part(white, at=(centre, room.height, middle), size=size)._replace(casts_shadow=False)
    paint = Look(
        WALL,
        pick(rng, PAINT),
        "stripes" if rng.random() < 0.2 else "plain",
        grain=rng.uniform(0.4, 1.5),
        contrast=rng.uniform(0.02, 0.1),
        period=rng.uniform(0.1, 0.3),
    )
    for x in (room.left - thick / 2, room.left + room.width + thick / 2):
        size = (thick, room.height, room.depth)
        yield part(paint, at=(x, 0, middle), size=size)._replace(casts_shadow=False)
    other = paint if rng.random() < 0.7 else paint._replace(colour=pick(rng, PAINT + CLOTH))
    for z in (room.near - thick / 2, room.near + room.depth + thick / 2):
        size = (room.width + 2 * thick, room.height, thick)
        yield part(other, at=(centre, 0, z), size=size)._replace(casts_shadow=False)


def _programme(rng: Rng) -> list[Callable[[Rng], Item]]:
    """What stands along the walls; the first finds most room."""
    kinds: list[list[Callable[[Rng], Item]]] = [
        [made.bed, made.wardrobe, made.desk, made.shelf, made.chair],
        [made.sofa, made.media, made.shelf, made.armchair, made.plant],
        [made.shelf, made.desk, made.desk, made.cupboard, made.chair],
        [made.cupboard, made.wardrobe, made.sofa, made.plant, made.desk],
    ]
    chosen = list(kinds[rng.integers(len(kinds))])
    every: list[Callable[[Rng], Item]] = [
        made.bed,
        made.sofa,
        made.wardrobe,
        made.cupboard,
        made.shelf,
        made.desk,
        made.media,
        made.chair,
        made.armchair,
        made.plant,
    ]
    chosen += [every[rng.integers(len(every))] for _ in range(3)]
    return [chosen[0], *(chosen[1 + number] for number in rng.permutation(len(chosen) - 1))]


def _along_a_wall(
    rng: Rng,
    room: Room,
    make: Callable[[Rng], Item],
    pieces: list[Piece],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Puts an item with its back to a wall, if a few tries find a free place."""
    item = make(rng)
    wide, deep = extent(item)
    far, right = room.near + room.depth, room.left + room.width
    for _ in range(12):
        wall = rng.choice(3, p=(0.5, 0.25, 0.25))
        gap = rng.uniform(0.01, 0.08)
        low, high = (room.left, right) if wall == 0 else (room.near + 0.8, far)
        if high - low < wide + 0.1:
            continue
        along = rng.uniform(low + wide / 2 + 0.03, high - wide / 2 - 0.03)
        if wall == 0:
            at, yaw = (along, 0.0, far - gap), 0.0
            box = (along - wide / 2, along + wide / 2, far - gap - deep, far)
        elif wall == 1:
            at, yaw = (room.left + gap, 0.0, along), -np.pi / 2
            box = (room.left, room.left + gap + deep, along - wide / 2, along + wide / 2)
        else:
            at, yaw = (right - gap, 0.0, along), np.pi / 2
            box = (right - gap - deep, right, along - wide / 2, along + wide / 2)
        if _free(box, taken):
            taken.append(box)
            pieces += turned(item, at=at, yaw=yaw)
            return


def _in_the_middle(
    rng: Rng, room: Room, pieces: list[Piece], taken: list[tuple[float, float, float, float]]
) -> None:
    """A table with chairs, or one in front of a sofa; and things on the floor."""
    if rng.random() < 0.6:
        low = rng.random() < 0.4
        item = made.table(rng, low=low)
        wide, deep = extent(item)
        for _ in range(10):
            x = rng.uniform(room.left + wide, room.left + room.width - wide)
            z = rng.uniform(1.4, max(1.5, room.near + room.depth - deep - 0.6))
            radius = max(wide, deep) / 2
            box = (x - radius, x + radius, z - radius, z + radius)
            if not _free(box, taken):
                continue
            taken.append(box)
            yaw = rng.choice((0.0, np.pi / 2)) + rng.normal(0.0, 0.1)
            pieces += turned(item, at=(x, 0.0, z), yaw=yaw)
            for turn in rng.choice(4, rng.integers(0, 4), replace=False) if not low else ():
                angle = yaw + turn * np.pi / 2
                reach = (deep if turn % 2 == 0 else wide) / 2 + 0.15
                at = (x - reach * np.sin(angle), 0.0, z - reach * np.cos(angle))
                pieces += turned(made.chair(rng), at=at, yaw=angle + np.pi + rng.normal(0.0, 0.2))
            break
    for _ in range(rng.poisson(1.5)):
        x, z = rng.uniform(room.left + 0.3, -room.left - 0.3), rng.uniform(1.2, 3.5)
        if z < room.near + room.depth - 0.3 and _free((x - 0.2, x + 0.2, z - 0.2, z + 0.2), taken):
            pieces += turned([made.thing(rng, rng.uniform(0.12, 0.4))], at=(x, 0.0, z), yaw=0.0)


def _free(box: tuple[float, ...], taken: list[tuple[float, float, float, float]]) -> bool:
    return all(
        box[1] <= other[0] or other[1] <= box[0] or box[3] <= other[2] or other[3] <= box[2]
        for other in taken
    )


def _on_a_wall(
    rng: Rng, room: Room, pieces: list[Piece], hung: list[tuple[int, float, float]]
) -> None:
    """A picture, a window or a television, flat on the far wall or one at the side."""
    kind, wall = rng.random(), int(rng.choice(3, p=(0.5, 0.25, 0.25)))
    if kind < 0.5:
        size = (rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.8), 0.03)
        look = Look(PICTURE, pick(rng, BRIGHT), "painting", grain=0.15, contrast=0.5)
        base = rng.uniform(1.2, 1.6)
    elif kind < 0.85:
        size = (rng.uniform(0.7, 1.6), rng.uniform(0.9, 1.3), 0.04)
        look = Look(WINDOW, (0.85, 0.88, 0.92), "window", grain=0.4, contrast=0.2)
        base = rng.uniform(0.8, 1.0)
    else:
        size = (rng.uniform(0.7, 1.2), rng.uniform(0.42, 0.65), 0.06)
        look = Look(TV, (0.03, 0.03, 0.035), "screen", contrast=0.1)
        base = rng.uniform(1.0, 1.4)
    size = (size[0], min(size[1], room.height - base - 0.1), size[2])
    item = [part(look, at=(0.0, base, -size[2] / 2), size=size)]
    far = room.near + room.depth
    margin = size[0] / 2 + 0.1
    along = (
        rng.uniform(room.left + margin, -room.left - margin)
        if wall == 0
        else rng.uniform(1.0, max(1.1, far - margin))
    )
    if any(wall == other and along + margin > a and along - margin < b for other, a, b in hung):
        return
    hung.append((wall, along - margin, along + margin))
    if wall == 0:
        pieces += turned(item, at=(along, 0.0, far), yaw=0.0)
    else:
        side = -1 if wall == 1 else 1
        pieces += turned(item, at=(side * room.width / 2, 0.0, along), yaw=side * np.pi / 2)
