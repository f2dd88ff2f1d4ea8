"""Random rooms: which furniture stands where.

Owns the layout of a room; single pieces are in `furniture`, the picture is made in `rooms`. Lengths
in metres. The room's floor is at y = 0; the camera stands at z = 0 near the middle of one wall and
looks along z.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from repmtl_ray.scenes import furniture as made
from repmtl_ray.scenes.furniture import Item, Make, extent, turned
from repmtl_ray.scenes.materials import Look, Piece, Rng, part, pick
from repmtl_ray.scenes.raycast import Camera

FOCAL = 518.8579 / 640  # image widths, as the colour camera of NYUv2


_FAR, _LEFT, _RIGHT = range(3)  # walls that the camera sees
Box: TypeAlias = tuple[float, float, float, float]
"""A part of the floor: x from, x to, z from, z to."""


class Room(NamedTuple):
    """A box of air, in metres; its middle is at x = 0.

    Attributes:
        width, depth, height: along x, z and y.
        near: z of the wall behind the camera, below 0.
    """

    width: float
    depth: float
    height: float
    near: float

    @property
    def right(self) -> float:
        """x of the right wall; the left one's is the negative of it."""
        return self.width / 2

    @property
    def far(self) -> float:
        """z of the wall before the camera."""
        return self.near + self.depth


def interior(rng: Rng) -> tuple[Camera, Room, list[Piece]]:
    """A random room with its furniture, and a camera in it."""
    width, depth, height = rng.uniform(3.0, 5.5), rng.uniform(3.2, 6.0), rng.uniform(2.3, 3.0)
    near = -rng.uniform(0.25, 0.6)
    room = Room(width, depth, height, near)
    camera = Camera(
        lateral=width * rng.uniform(-0.25, 0.25),
        height=rng.uniform(1.1, 1.7),
        yaw=rng.normal(0.0, 0.35),
        pitch=rng.uniform(0.02, 0.4),
        focal=FOCAL,
    )
    pieces = list(_shell(rng, room))
    taken = [(camera.lateral - 0.5, camera.lateral + 0.5, near, 0.9)]
    for make in _programme(rng):
        _along_a_wall(rng, room, make(rng), pieces, taken)
    _in_the_middle(rng, room, pieces, taken)
    hung: list[tuple[int, float, float]] = []  # wall, and from where to where along it
    for _ in range(1 + rng.poisson(2.0)):
        _on_a_wall(rng, room, pieces, hung)
    return camera, room, pieces


def _shell(rng: Rng, room: Room) -> Iterator[Piece]:
    """Floor, ceiling and walls: slabs around the air."""
    middle, thick = room.near + room.depth / 2, 0.5
    outer_width, outer_depth = room.width + 2 * thick, room.depth + 2 * thick
    floor = Look(
        made.FLOOR,
        pick(rng, made.WOOD + made.CLOTH),
        ("planks", "tiles", "plain")[rng.integers(3)],
        grain=rng.uniform(0.05, 0.4),
        contrast=rng.uniform(0.05, 0.25),
        period=rng.uniform(0.12, 0.45),
    )
    white = Look(made.CEILING, pick(rng, made.PAINT[:2]), grain=0.8, contrast=0.03)
    for look, y in ((floor, -thick), (white, room.height)):
        size = (outer_width, thick, outer_depth)
        yield part(look, at=(0, y, middle), size=size, casts_shadow=False)
    paint = Look(
        made.WALL,
        pick(rng, made.PAINT),
        "stripes" if rng.random() < 0.2 else "plain",
        grain=rng.uniform(0.4, 1.5),
        contrast=rng.uniform(0.02, 0.1),
        period=rng.uniform(0.1, 0.3),
    )
    for x in (-room.right - thick / 2, room.right + thick / 2):
        size = (thick, room.height, room.depth)
        yield part(paint, at=(x, 0, middle), size=size, casts_shadow=False)
    if rng.random() >= 0.7:
        paint = paint._replace(colour=pick(rng, made.PAINT + made.CLOTH))
    for z in (room.near - thick / 2, room.far + thick / 2):
        size = (outer_width, room.height, thick)
        yield part(paint, at=(0, 0, z), size=size, casts_shadow=False)


def _programme(rng: Rng) -> list[Make]:
    """What stands along the walls; the first finds most room."""
    kinds: tuple[tuple[Make, ...], ...] = (
        (made.bed, made.wardrobe, made.desk, made.shelf, made.chair),
        (made.sofa, made.media, made.shelf, made.armchair, made.plant),
        (made.shelf, made.desk, made.desk, made.cupboard, made.chair),
        (made.cupboard, made.wardrobe, made.sofa, made.plant, made.desk),
    )
    first, *others = kinds[rng.integers(len(kinds))]
    others += [made.EVERY[rng.integers(len(made.EVERY))] for _ in range(3)]
    return [first, *(others[number] for number in rng.permutation(len(others)))]


def _against_wall(item: Item, room: Room, wall: int, along: float, gap: float = 0.0) -> Item:
    """An item with its back to a wall, at a place along it."""
    if wall == _FAR:
        return turned(item, at=(along, 0.0, room.far - gap), yaw=0.0)
    side = -1 if wall == _LEFT else 1
    return turned(item, at=(side * (room.right - gap), 0.0, along), yaw=side * np.pi / 2)


def _along_a_wall(rng: Rng, room: Room, item: Item, pieces: list[Piece], taken: list[Box]) -> None:
    """Puts an item with its back to a wall, if a few tries find a free place."""
    wide, deep = extent(item)
    for _ in range(12):
        wall = rng.choice(3, p=(0.5, 0.25, 0.25))
        gap = rng.uniform(0.01, 0.08)
        low, high = (-room.right, room.right) if wall == _FAR else (room.near + 0.8, room.far)
        if high - low < wide + 0.1:
            continue
        along = rng.uniform(low + wide / 2 + 0.03, high - wide / 2 - 0.03)
        start, end = along - wide / 2, along + wide / 2
        box = {
            _FAR: (start, end, room.far - gap - deep, room.far),
            _LEFT: (-room.right, -room.right + gap + deep, start, end),
            _RIGHT: (room.right - gap - deep, room.right, start, end),
        }[wall]
        if _free(box, taken):
            taken.append(box)
            pieces += _against_wall(item, room, wall, along, gap)
            return


def _in_the_middle(rng: Rng, room: Room, pieces: list[Piece], taken: list[Box]) -> None:
    """A table with chairs, or one in front of a sofa; and things on the floor."""
    if rng.random() < 0.6:
        low = rng.random() < 0.4
        item = made.table(rng, low=low)
        wide, deep = extent(item)
        for _ in range(10):
            x = rng.uniform(-room.right + wide, room.right - wide)
            z = rng.uniform(1.4, max(1.5, room.far - deep - 0.6))
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
        x, z = rng.uniform(-room.right + 0.3, room.right - 0.3), rng.uniform(1.2, 3.5)
        if z < room.far - 0.3 and _free((x - 0.2, x + 0.2, z - 0.2, z + 0.2), taken):
            pieces += turned([made.thing(rng, rng.uniform(0.12, 0.4))], at=(x, 0.0, z), yaw=0.0)


def _free(box: Box, taken: list[Box]) -> bool:
    left, right, near, far = box
    return all(right <= a or b <= left or far <= c or d <= near for a, b, c, d in taken)


def _on_a_wall(
    rng: Rng, room: Room, pieces: list[Piece], hung: list[tuple[int, float, float]]
) -> None:
    """A picture, a window or a television, flat on the far wall or one at the side."""
    kind, wall = rng.random(), int(rng.choice(3, p=(0.5, 0.25, 0.25)))
    if kind < 0.5:
        size = (rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.8), 0.03)
        look = Look(made.PICTURE, pick(rng, made.BRIGHT), "painting", grain=0.15, contrast=0.5)
        base = rng.uniform(1.2, 1.6)
    elif kind < 0.85:
        size = (rng.uniform(0.7, 1.6), rng.uniform(0.9, 1.3), 0.04)
        look = Look(made.WINDOW, (0.85, 0.88, 0.92), "window", grain=0.4, contrast=0.2)
        base = rng.uniform(0.8, 1.0)
    else:
        size = (rng.uniform(0.7, 1.2), rng.uniform(0.42, 0.65), 0.06)
        look = Look(made.TV, (0.03, 0.03, 0.035), "screen", contrast=0.1)
        base = rng.uniform(1.0, 1.4)
    size = (size[0], min(size[1], room.height - base - 0.1), size[2])
    item = [part(look, at=(0.0, base, -size[2] / 2), size=size)]
    margin = size[0] / 2 + 0.1
    if wall == _FAR:
        along = rng.uniform(-room.right + margin, room.right - margin)
    else:
        along = rng.uniform(1.0, max(1.1, room.far - margin))
    start, end = along - margin, along + margin
    if not any(wall == other and end > low and start < high for other, low, high in hung):
        hung.append((wall, start, end))
        pieces += _against_wall(item, room, wall, along)
