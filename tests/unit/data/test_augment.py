"""Against per-pixel loops, and against what must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repmtl_ray.data.augment import SCALES, augment
from repmtl_ray.data.stream import Kind
from repmtl_ray.scenes.room_layout import FOCAL
from repmtl_ray.scenes.rooms import render

KINDS: dict[str, Kind] = {
    "image": "image",
    "segmentation": "label",
    "metres": "depth",
    "disparity": "inverse_depth",
    "normal": "normal",
    "domain": "class",
}


def sample(
    rng: np.random.Generator, height: int = 16, width: int = 32, *, bytes_: bool = False
) -> dict[str, Any]:
    metres = rng.uniform(1, 80, (height, width, 1)).astype(np.float32)
    metres[rng.random(metres.shape) < 0.3] = 0
    normal = rng.standard_normal((height, width, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    normal[rng.random((height, width)) < 0.3] = 0
    image = rng.random((height, width, 3), dtype=np.float32)
    return {
        "sample_id": np.array(3),
        "image": (image * 255).astype(np.uint8) if bytes_ else image,
        "segmentation": rng.integers(-1, 7, (height, width)).astype(np.int16),
        "metres": metres,
        "disparity": np.divide(1, metres, out=np.zeros_like(metres), where=metres > 0),
        "normal": normal,
        "domain": np.array(5),
    }


def slow_augment(sample: Any, rng: Any) -> Any:
    """One pixel after the other, from the definition.

    For sizes that are powers of two, no pixel's centre falls on the border of two others.
    """
    height, width = sample["segmentation"].shape
    scale = (1.0, 1.2, 1.5)[rng.integers(3)]
    rows, columns = int(height / scale), int(width / scale)
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    flip = rng.random() < 0.5
    result = {name: np.array(values) for name, values in sample.items()}
    for y in range(height):
        for x in range(width):
            source_x = width - 1 - x if flip else x
            centre = (y + 0.5) * rows / height, (source_x + 0.5) * columns / width
            nearest = top + int(centre[0]), left + int(centre[1])
            result["segmentation"][y, x] = sample["segmentation"][nearest]
            result["metres"][y, x] = sample["metres"][nearest] / scale
            result["disparity"][y, x] = sample["disparity"][nearest] * scale
            mixed = {}
            for name in ("image", "normal"):
                mixed[name] = np.zeros(3)
                for dy in (0, 1):
                    for dx in (0, 1):
                        row = int(np.floor(centre[0] - 0.5)) + dy
                        column = int(np.floor(centre[1] - 0.5)) + dx
                        weight = (1 - abs(centre[0] - 0.5 - row)) * (
                            1 - abs(centre[1] - 0.5 - column)
                        )
                        row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
                        mixed[name] += weight * sample[name][top + row, left + column]
            image = mixed["image"]
            result["image"][y, x] = np.round(image) if sample["image"].dtype == np.uint8 else image
            normal = mixed["normal"] * ([-1, 1, 1] if flip else [1, 1, 1])
            valid = sample["normal"][nearest].any()
            result["normal"][y, x] = normal / np.linalg.norm(normal) if valid else 0
    return result


@pytest.mark.parametrize("bytes_", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_against_a_slow_reference(seed: int, bytes_: bool) -> None:
    before = sample(np.random.default_rng(100 + seed), bytes_=bytes_)
    found = augment(before, rng=np.random.default_rng(seed), kinds=KINDS)
    expected = slow_augment(before, np.random.default_rng(seed))
    assert list(found) == list(before)
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (before[name].dtype, before[name].shape)
        # OpenCV mixes bytes in fixed point, and positions in float32.
        tolerance = {"image": 1 if bytes_ else 1e-5, "normal": 2e-4}.get(name, 0)
        np.testing.assert_allclose(found[name], values, atol=tolerance, rtol=1e-6, err_msg=name)


def seed_with(scale: float, offset: tuple[int, int], flip: bool) -> int:
    """A seed that draws this view of a sample of 16 x 32 pixels."""
    for seed in range(20_000):
        rng = np.random.default_rng(seed)
        drawn = SCALES[rng.integers(3)]
        top, left = (rng.integers(size - int(size / drawn) + 1) for size in (16, 32))
        if (drawn, (top, left), rng.random() < 0.5) == (scale, offset, flip):
            return seed
    raise AssertionError("no such seed")


def test_flipping_twice_changes_nothing() -> None:
    before = sample(np.random.default_rng(0))
    seed = seed_with(1.0, (0, 0), True)
    once = augment(before, rng=np.random.default_rng(seed), kinds=KINDS)
    twice = augment(once, rng=np.random.default_rng(seed), kinds=KINDS)
    for name, values in before.items():
        np.testing.assert_array_equal(twice[name], values)
    np.testing.assert_array_equal(once["normal"][:, ::-1, 0], -before["normal"][:, :, 0])
    assert not np.array_equal(once["image"], before["image"])


@pytest.mark.parametrize(("scale", "offset"), [(1.0, (0, 0)), (1.2, (2, 3)), (1.5, (6, 0))])
def test_a_flipped_view_is_the_view_flipped(scale: float, offset: tuple[int, ...]) -> None:
    before = sample(np.random.default_rng(1))
    straight, flipped = (
        augment(before, rng=np.random.default_rng(seed_with(scale, offset, flip)), kinds=KINDS)
        for flip in (False, True)
    )
    for name in ("image", "segmentation", "metres", "disparity"):
        np.testing.assert_array_equal(straight[name], flipped[name][:, ::-1])
    np.testing.assert_array_equal(straight["normal"] * [-1, 1, 1], flipped["normal"][:, ::-1])


@pytest.mark.parametrize("seed", range(8))
def test_depth_and_its_inverse_stay_inverse(seed: int) -> None:
    view = augment(
        sample(np.random.default_rng(seed)), rng=np.random.default_rng(seed), kinds=KINDS
    )
    valid = view["metres"] > 0
    np.testing.assert_array_equal(valid, view["disparity"] > 0)
    np.testing.assert_allclose((view["metres"] * view["disparity"])[valid], 1, rtol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_normals_are_unit_vectors_or_invalid(seed: int) -> None:
    before = sample(np.random.default_rng(seed))
    length = np.linalg.norm(
        augment(before, rng=np.random.default_rng(seed), kinds=KINDS)["normal"], axis=2
    )
    np.testing.assert_allclose(length[length > 0], 1, atol=1e-5)
    assert (length == 0).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_view_does_not_depend_on_which_targets_are_there(seed: int) -> None:
    before = sample(np.random.default_rng(seed))
    whole = augment(before, rng=np.random.default_rng(seed), kinds=KINDS)
    for kept in (("image",), ("image", "domain"), ("image", "segmentation")):
        part = augment(
            {name: before[name] for name in kept},
            rng=np.random.default_rng(seed),
            kinds={name: KINDS[name] for name in kept},
        )
        assert tuple(part) == kept
        for name in kept:
            np.testing.assert_array_equal(part[name], whole[name])


def test_the_sample_given_is_left_alone_and_all_views_come_up() -> None:
    before = sample(np.random.default_rng(0), bytes_=True)
    copy = {name: values.copy() for name, values in before.items()}
    rng = np.random.default_rng(0)
    views = {augment(before, rng=rng, kinds=KINDS)["image"].tobytes() for _ in range(40)}
    assert len(views) > 20
    assert before["image"].tobytes() in views
    for name, values in copy.items():
        np.testing.assert_array_equal(before[name], values)


def test_the_normals_of_a_flipped_room_stand_on_its_flipped_surfaces() -> None:
    """Geometry instead of the definition: normals face the camera, as seen from flipped pixels."""
    room = render(0, 3, height=16, width=32)
    before = {"image": room["image"], "metres": room["depth"], "normal": room["normal"]}
    kinds = {"image": "image", "metres": "depth", "normal": "normal"}
    rng = np.random.default_rng(seed_with(1.0, (0, 0), True))
    flipped = augment(before, rng=rng, kinds=kinds)
    assert not np.array_equal(flipped["image"], before["image"])
    right = (np.arange(32) + 0.5 - 16) / (FOCAL * 32)
    up = (8 - np.arange(16) - 0.5)[:, None] / (FOCAL * 32)
    rays = np.stack(np.broadcast_arrays(right, up, -1.0), axis=2)
    for view in (before, flipped):
        facing = (rays * view["normal"]).sum(axis=2)[view["normal"].any(axis=2)]
        assert facing.max() < 1e-6
        along = (rays * view["metres"] * view["normal"]).sum(axis=2)  # -distance of the plane
        same = (view["normal"][:, 1:] == view["normal"][:, :-1]).all(axis=2)
        same &= view["normal"][:, 1:].any(axis=2)
        apart = np.abs(np.diff(along, axis=1))[same]
        assert same.sum() > 200
        assert np.median(apart) < 1e-5
