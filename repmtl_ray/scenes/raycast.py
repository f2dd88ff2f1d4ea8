"""Ray casting of simple solids in NumPy: camera, visible points, shadows, noise.

Owns geometry, and neither classes nor colours. World axes: x to the right, y up, z ahead, in metres.
Vectors keep their three components on the first axis, so `rays[0]` is one contiguous plane of x
components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Floats: TypeAlias = NDArray[np.floating]
Form: TypeAlias = Literal["box", "ellipsoid", "cylinder"]

_NEAR = 1e-6  # metres; hits closer than this are the surface that the ray starts from
_LATTICE = 64  # side of a noise table; a power of two


class Camera(NamedTuple):
    """Pinhole camera above the point (lateral, 0, 0).

    Attributes:
        lateral: metres to the right of x = 0.
        height: metres above the ground.
        yaw: radians, positive to the right.
        pitch: radians, positive down.
        focal: focal length in image widths.
    """

    lateral: float
    height: float
    yaw: float
    pitch: float
    focal: float

    @property
    def position(self) -> Floats:
        """[3], metres."""
        return np.array([self.lateral, self.height, 0.0])

    @property
    def to_world(self) -> Floats:
        """[3, 3]; columns are the camera's right, up and forward in the world."""
        sin_yaw, cos_yaw = np.sin(self.yaw), np.cos(self.yaw)
        sin_pitch, cos_pitch = np.sin(self.pitch), np.cos(self.pitch)
        turn = np.array([[cos_yaw, 0, sin_yaw], [0, 1, 0], [-sin_yaw, 0, cos_yaw]])
        tilt = np.array([[1, 0, 0], [0, cos_pitch, -sin_pitch], [0, sin_pitch, cos_pitch]])
        axes: Floats = turn @ tilt
        return axes


class Solid(NamedTuple):
    """A box, ellipsoid or upright cylinder (open ends), turned about the vertical.

    Attributes:
        form: which solid.
        centre: metres.
        half: half of the extent along each own axis, metres.
        yaw: radians, positive from z towards x.
        ragged: 0 for a smooth outline, up to 1 for one frayed by noise (ellipsoids only).
    """

    form: Form
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float = 0.0
    ragged: float = 0.0


class Hits(NamedTuple):
    """Visible points; the last axis of every array has one entry per point.

    Attributes:
        pixels: index into the flattened picture.
        ids: index of the solid that the point lies on.
        metres: along the optical axis.
        footprint: metres that one pixel spans at the point.
        points: [3, points], metres, world axes.
        local: [3, points], metres from the solid's centre, in its own axes.
        half: [3, points], metres, half of the solid's extents.
        axis: 0 to 2, the solid's own axis nearest to the normal.
        normals: [3, points], unit, outward, world axes.
    """

    pixels: NDArray[np.intp]
    ids: NDArray[np.intp]
    metres: Floats
    footprint: Floats
    points: Floats
    local: Floats
    half: Floats
    axis: NDArray[np.intp]
    normals: Floats

    def at(self, index: NDArray[np.intp]) -> Hits:
        """Some of the points."""
        return Hits._make(values[..., index] for values in self)


def camera_rays(camera: Camera, height: int, width: int) -> Floats:
    """Direction through each pixel's centre, scaled so that its length is in units of depth.

    Returns:
        [3, height, width]; the component along the optical axis is 1, so that
        `position + depth * ray` is the point at that depth.
    """
    focal = camera.focal * width
    right = (np.arange(width) + 0.5 - width / 2) / focal
    up = (height / 2 - np.arange(height) - 0.5) / focal
    axes = camera.to_world
    rows = axes[:, 1, None] * up + axes[:, 2, None]
    return rows[:, :, None] + (axes[:, 0, None] * right)[:, None, :]


def trace(
    camera: Camera, solids: Sequence[Solid], noise: Floats, *, height: int, width: int
) -> tuple[Floats, NDArray[np.intp]]:
    """What each pixel sees first.

    Args:
        camera: must be outside every solid.
        solids: any order.
        noise: [64, 64] in [0, 1]; frays ragged outlines.
        height: pixels.
        width: pixels.

    Returns:
        depth: [height, width], metres along the optical axis; infinity where nothing is hit.
        ids: [height, width], index into solids; -1 where nothing is hit.
    """
    rays, position = camera_rays(camera, height, width), camera.position[:, None, None]
    depth = np.full((height, width), np.inf)
    ids = np.full((height, width), -1, dtype=np.intp)
    nearest, windows = _windows(camera, solids, height, width)
    for number in np.argsort(nearest, kind="stable"):  # near to far: hidden solids cost nothing
        top, bottom, left, right = windows[number]
        if top >= bottom or left >= right:
            continue
        window = np.s_[top:bottom, left:right]
        if depth[window].max() <= nearest[number]:
            continue
        distance = _enter(solids[number], position, rays[(slice(None), *window)], noise)
        closer = distance < depth[window]
        np.copyto(depth[window], distance, where=closer)
        np.copyto(ids[window], number, where=closer)
    return depth, ids


def _windows(
    camera: Camera, solids: Sequence[Solid], height: int, width: int
) -> tuple[Floats, NDArray[np.intp]]:
    """Least depth [solids] and pixels' bounds [solids, 4] (top, bottom, left, right) of solids."""
    centre = np.array([solid.centre for solid in solids])
    half = np.array([solid.half for solid in solids])
    yaw = np.array([solid.yaw for solid in solids])
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
    x, y, z = np.moveaxis(half[:, :, None] * signs, 1, 0)
    sin, cos = np.sin(yaw)[:, None], np.cos(yaw)[:, None]
    corners = np.stack([cos * x + sin * z, y, cos * z - sin * x])
    corners += (centre - camera.position).T[:, :, None]
    right, up, forward = np.einsum("wc,wnk->cnk", camera.to_world, corners)
    nearest = forward.min(axis=1)
    ahead = np.maximum(forward, 0.05)
    columns = width / 2 + camera.focal * width * right / ahead
    rows = height / 2 - camera.focal * width * up / ahead
    bounds = [rows.min(1), rows.max(1) + 1, columns.min(1), columns.max(1) + 1]
    bounds = np.floor(np.stack(bounds, axis=1))
    whole = np.array([0, height, 0, width])
    bounds[nearest < 0.05] = whole  # reaches behind the camera: its projection bounds nothing
    bounds[forward.max(axis=1) < 0.05] = 0
    return nearest, np.clip(bounds, 0, whole[[1, 1, 3, 3]]).astype(np.intp)


def _enter(solid: Solid, start: Floats, rays: Floats, noise: Floats) -> Floats:
    """Ray parameter where each ray enters the solid; infinity for a miss or a start inside."""
    centre = np.reshape(solid.centre, (3,) + (1,) * (start.ndim - 1))
    own_start, own_rays = _own_axes(solid, start - centre), _own_axes(solid, rays)
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.form == "box":
            return _enter_box(solid, own_start, own_rays)
        return _enter_round(solid, own_start, own_rays, noise)


def _own_axes(solid: Solid, vectors: Floats) -> Sequence[Floats]:
    x, y, z = vectors
    if solid.yaw:
        sin, cos = np.sin(solid.yaw), np.cos(solid.yaw)
        x, z = cos * x - sin * z, sin * x + cos * z
    return x, y, z


def _enter_box(solid: Solid, start: Sequence[Floats], rays: Sequence[Floats]) -> Floats:
    enters, leaves = [], []
    for half, origin, ray in zip(solid.half, start, rays, strict=True):
        slope = 1.0 / (ray + 1e-300)  # a ray along the slab divides by almost nothing, not by 0
        middle, reach = origin * -slope, half * np.abs(slope)
        enters.append(middle - reach)
        leaves.append(middle + reach)
    enter = np.maximum(np.maximum(enters[0], enters[1]), enters[2])
    leave = np.minimum(np.minimum(leaves[0], leaves[1]), leaves[2])
    return np.where((enter <= leave) & (enter > _NEAR), enter, np.inf)


def _enter_round(
    solid: Solid, start: Sequence[Floats], rays: Sequence[Floats], noise: Floats
) -> Floats:
    # In units of its half extents the solid is the unit ball, or the unit tube.
    x, y, z = (part / half for part, half in zip(start, solid.half, strict=True))
    right, up, forward = (part / half for part, half in zip(rays, solid.half, strict=True))
    tube = solid.form == "cylinder"
    square, product = right * right + forward * forward, x * right + z * forward
    if not tube:
        square, product = square + up * up, product + y * up
    closest = product / -square
    # Distance at the closest approach rather than b^2 - 4ac, which cancels for small far solids.
    gap = (x + closest * right) ** 2 + (z + closest * forward) ** 2
    if not tube:
        gap += (y + closest * up) ** 2
    enter = closest - np.sqrt((1.0 - gap) / square)  # NaN for a miss
    hit = enter > _NEAR
    if tube:
        hit &= np.abs(y + enter * up) <= 1.0
    if solid.ragged and hit.any():
        enter = np.where(hit, enter, 0.0)
        size = [4.0 * min(half, 2.0) for half in solid.half]  # noise periods across the radius
        height = (y + enter * up) * size[1]
        fray = value_noise(
            noise,
            (x + enter * right) * size[0] + height,
            (z + enter * forward) * size[2] + height,
        )
        hit &= 1.0 - gap > solid.ragged * fray**2
    return np.where(hit, enter, np.inf)


def visible_points(
    camera: Camera,
    solids: Sequence[Solid],
    metres: Floats,
    ids: NDArray[np.intp],
    dtype: DTypeLike,
) -> Hits:
    """The points that the pixels show.

    Args:
        camera, solids: as for `trace`.
        metres, ids: [height, width], as from `trace`.
        dtype: of the result's floats.
    """
    height, width = ids.shape
    pixels = np.flatnonzero(ids >= 0)
    ids, metres = ids.reshape(-1)[pixels], metres.reshape(-1)[pixels]
    rays = camera_rays(camera, height, width).reshape(3, -1)[:, pixels]
    points = (camera.position[:, None] + metres * rays).astype(dtype)
    metres = metres.astype(dtype)
    centre = np.array([solid.centre for solid in solids], dtype=dtype).T[:, ids]
    half = np.array([solid.half for solid in solids], dtype=dtype).T[:, ids]
    yaw = np.array([solid.yaw for solid in solids], dtype=dtype)
    sin, cos = np.sin(yaw)[ids], np.cos(yaw)[ids]
    x, y, z = points - centre
    local = np.stack([cos * x - sin * z, y, sin * x + cos * z])
    unit = local / half
    axis = np.abs(unit).argmax(axis=0)
    outward = unit / half
    outward[1, np.array([solid.form == "cylinder" for solid in solids])[ids]] = 0.0
    boxes = np.flatnonzero(np.array([solid.form == "box" for solid in solids])[ids])
    outward[:, boxes] *= axis[boxes] == np.arange(3)[:, None]
    outward /= np.sqrt(dot(outward, outward)) + 1e-12
    x, y, z = outward
    normals = np.stack([cos * x + sin * z, y, cos * z - sin * x])
    footprint = metres / (camera.focal * width)
    return Hits(pixels, ids, metres, footprint, points, local, half, axis, normals)


def shadowed(
    points: Floats, sun: Floats, casters: Sequence[Solid], noise: Floats
) -> NDArray[np.bool_]:
    """Which points a caster hides from the sun.

    Args:
        points: [3, points], metres, lifted off their surface a little.
        sun: [3], unit, towards the sun.
        casters: any order.
        noise: [64, 64] in [0, 1]; frays ragged outlines.

    Returns:
        [points].
    """
    across = np.array([sun[2], 0.0, -sun[0]], dtype=sun.dtype)
    across /= np.hypot(sun[0], sun[2]) + 1e-12
    # Sorted across the light, the points that a caster may hide are one slice.
    order = np.argsort(dot(across, points), kind="stable")
    points, dark = points[:, order], np.zeros(len(order), dtype=bool)
    aside = dot(across, points)
    for solid in casters:
        centre, radius = np.array(solid.centre, dtype=sun.dtype), float(np.linalg.norm(solid.half))
        reach = np.hypot(solid.half[0], solid.half[2])
        middle = dot(across, centre)
        first, last = np.searchsorted(aside, (middle - reach, middle + reach))
        gap = points[:, first:last] - centre[:, None]
        ahead = dot(sun, gap)
        beside = dot(gap, gap) - ahead * ahead < radius**2
        near = first + np.flatnonzero(beside & (ahead < radius) & ~dark[first:last])
        if near.size:
            dark[near] = np.isfinite(_enter(solid, points[:, near], sun[:, None], noise))
    unsorted = np.empty_like(dark)
    unsorted[order] = dark
    return unsorted


def dot(one: Floats, other: Floats) -> Floats:
    """Sum over the first axis, of length 3; the same bits whatever the number of BLAS threads."""
    total: Floats = one[0] * other[0] + one[1] * other[1] + one[2] * other[2]
    return total


def value_noise(noise: Floats, a: Floats, b: Floats) -> Floats:
    """Smooth noise with a period of one unit between independent values, fixed to (a, b).

    Args:
        noise: [64, 64]; repeats beyond.
        a: any shape, finite.
        b: as a.

    Returns:
        As a, in the range of the table.
    """
    row, column = np.floor(a), np.floor(b)
    down, across = a - row, b - column
    down *= down * (3.0 - 2.0 * down)
    across *= across * (3.0 - 2.0 * across)
    row, column = row.astype(np.int32), column.astype(np.int32)
    last = _LATTICE - 1
    above, below = (row & last) * _LATTICE, ((row + 1) & last) * _LATTICE
    before, after = column & last, (column + 1) & last
    flat = noise.reshape(-1)
    upper, lower = flat[above + before], flat[below + before]
    upper = upper + across * (flat[above + after] - upper)
    lower = lower + across * (flat[below + after] - lower)
    return upper + down * (lower - upper)
