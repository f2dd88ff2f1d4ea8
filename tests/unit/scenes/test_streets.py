"""Properties of the rendered streets: contract, geometry and learnability."""

from __future__ import annotations

import numpy as np
import pytest

from repmtl_ray.scenes.raycast import (
    Camera,
    Solid,
    shadowed,
    trace,
    value_noise,
)
from repmtl_ray.scenes.scene_cache import VAL_OFFSET
from repmtl_ray.scenes.sensors import stereo_matched
from repmtl_ray.scenes.streets import INVERSE_DEPTH, render

NOISE = np.random.default_rng(0).random((64, 64))


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, np.ndarray]]:
    return [render(0, index, height=64, width=128) for index in range(64)]


# The scene


@pytest.mark.parametrize("shape", [(64, 128), (33, 50)])
def test_a_scene_keeps_the_cityscapes_contract(shape: tuple[int, ...]) -> None:
    height, width = shape
    scene = render(1, 2, height=height, width=width)
    image, label, depth = scene["image"], scene["label_7"], scene["depth"]
    assert list(scene) == ["image", "label_7", "depth"]
    assert (image.shape, image.dtype) == ((height, width, 3), np.float32)
    assert (label.shape, label.dtype) == ((height, width), np.int16)
    assert (depth.shape, depth.dtype) == ((height, width, 1), np.float32)
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    assert label.min() >= -1
    assert label.max() <= 6
    assert depth.min() >= 0.0
    assert depth.max() <= 0.4923


def test_a_scene_is_a_function_of_its_arguments() -> None:
    one, again = (render(3, 4, height=32, width=64) for _ in range(2))
    for column, values in one.items():
        np.testing.assert_array_equal(values, again[column])
    for seed, index in [(4, 4), (3, 5), (4, 3), (3, VAL_OFFSET + 4)]:
        assert (render(seed, index, height=32, width=64)["image"] != one["image"]).mean() > 0.9


def test_two_sizes_show_the_same_view() -> None:
    small, large = (render(0, 7, height=size, width=2 * size) for size in (64, 192))
    centre = np.s_[1::3, 1::3]  # the middle one of each 3 x 3 pixels looks along the same ray
    both = (small["label_7"] >= 0) & (large["label_7"][centre] >= 0)
    np.testing.assert_array_equal(small["label_7"][both], large["label_7"][centre][both])
    both = (small["depth"] > 0) & (large["depth"][centre] > 0)
    np.testing.assert_allclose(small["depth"][both], large["depth"][centre][both], rtol=1e-5)
    light = [scene["image"].mean(axis=(0, 1)) for scene in (small, large)]
    first, second = light
    np.testing.assert_allclose(first, second, atol=0.02)


def test_every_class_and_every_kind_of_gap_is_common_enough_to_matter(
    scenes: list[dict[str, np.ndarray]],
) -> None:
    labels = np.stack([scene["label_7"] for scene in scenes])
    share = np.array([(labels == label).mean() for label in range(7)])
    assert (share > 0.005).all(), share
    assert share.max() < 0.6, share
    assert 0.0 < (labels == -1).mean() < 0.1
    invalid = np.array([(scene["depth"] == 0).mean() for scene in scenes])
    assert 0.15 < np.median(invalid) < 0.4
    assert (invalid > 0.5).any()
    for scene in scenes:
        assert not scene["depth"][scene["label_7"] == 6].any(), "sky has no depth"


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"index": 2**32}, {"height": 8}, {"width": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_render_refuses_arguments_out_of_range(wrong: dict[str, int]) -> None:
    arguments = {"seed": 0, "index": 0, "height": 32, "width": 64} | wrong
    with pytest.raises(ValueError, match=f"render: {next(iter(wrong))} is"):
        render(
            arguments["seed"],
            arguments["index"],
            height=arguments["height"],
            width=arguments["width"],
        )


# Geometry


@pytest.mark.parametrize("yaw", [0.0, 0.1])
@pytest.mark.parametrize("pitch", [0.0, 0.06])
def test_depth_of_the_ground_follows_from_the_horizon(pitch: float, yaw: float) -> None:
    camera = Camera(lateral=1.5, height=1.3, yaw=yaw, pitch=pitch, focal=1.1)
    ground = Solid("box", (0.0, -0.5, 0.0), (1e5, 0.5, 1e5))
    depth, ids = trace(camera, [ground], NOISE, height=64, width=128)
    # A row looks down by pitch plus its own angle below the middle of the image.
    below = (np.arange(64) + 0.5 - 32) / (1.1 * 128)
    inverse = (below * np.cos(pitch) + np.sin(pitch)) / 1.3
    rows = inverse > 1e-4
    expected = np.broadcast_to(inverse[rows, None], (rows.sum(), 128))
    np.testing.assert_allclose(1.0 / depth[rows], expected, rtol=1e-9)
    assert (ids[inverse < 0] == -1).all()


def test_inverse_depth_of_a_rendered_road_is_affine_in_the_pixel(
    scenes: list[dict[str, np.ndarray]],
) -> None:
    # A plane's inverse depth is an affine function of the pixel; here the strip before the car.
    checked = 0
    for scene in scenes:
        strip = np.s_[46:58, 58:70]
        inverse, label = scene["depth"][strip][..., 0], scene["label_7"][strip]
        rows, columns = np.nonzero((inverse > 0) & (label == 0))
        if len(rows) < 100:
            continue
        design = np.stack([rows, columns, np.ones_like(rows)], axis=1).astype(float)
        values = inverse[rows, columns].astype(float)
        fit = np.linalg.lstsq(design, values, rcond=None)[0]
        np.testing.assert_allclose(design @ fit, values, rtol=1e-5)
        metres_up = INVERSE_DEPTH / (fit[0] * 128 * 2262.5 / 2048)  # the slope tells the height
        assert 1.05 < metres_up < 1.55
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("form", ["box", "ellipsoid", "cylinder"])
def test_the_nearer_solid_hides_the_farther_in_any_order(form: str) -> None:
    camera = Camera(lateral=0.0, height=1.0, yaw=0.0, pitch=0.0, focal=1.0)
    near = Solid(form, (0.0, 1.0, 5.0), (0.5, 0.5, 1.0))
    far = Solid("box", (0.0, 1.0, 10.0), (3.0, 3.0, 1.0), yaw=0.0)
    for solids, names in [((near, far), (0, 1)), ((far, near), (1, 0))]:
        depth, ids = trace(camera, solids, NOISE, height=33, width=65)
        assert (ids[16, 32], ids[16, 45]) == names
        assert depth[16, 32] == pytest.approx(4.0)
        assert depth[16, 45] == pytest.approx(9.0)


@pytest.mark.parametrize("form", ["box", "ellipsoid", "cylinder"])
def test_a_solid_is_turned_and_found_within_its_window(form: str) -> None:
    # The window is only an optimisation: a camera that turns with the world sees the same.
    solids = [Solid(form, (1.0, 1.2, 7.0), (0.4, 0.7, 1.5), yaw=0.5)]
    camera = Camera(lateral=0.0, height=1.0, yaw=0.0, pitch=0.05, focal=1.0)
    turned = camera._replace(yaw=0.3)
    x, y, z = solids[0].centre
    cos, sin = np.cos(0.3), np.sin(0.3)
    moved = [solids[0]._replace(centre=(cos * x + sin * z, y, cos * z - sin * x), yaw=0.8)]
    depth, _ = trace(camera, solids, NOISE, height=48, width=96)
    again, _ = trace(turned, moved, NOISE, height=48, width=96)
    assert np.isfinite(depth).sum() > 50
    np.testing.assert_allclose(depth, again, rtol=1e-9)


def test_a_shadow_falls_away_from_the_sun() -> None:
    pole = Solid("box", (0.0, 1.0, 0.0), (0.1, 1.0, 0.1))
    sun = np.array([1.0, 1.0, 0.0]) / np.sqrt(2.0)
    x = np.array([-3.0, -1.9, -1.0, -0.2, 0.2, 1.0])
    points = np.stack([x, np.zeros(6), np.zeros(6)])
    dark = shadowed(points, sun, [pole], NOISE)
    np.testing.assert_array_equal(dark, [False, True, True, True, False, False])


def test_stereo_loses_what_lies_left_of_a_foreground_edge_and_of_the_image() -> None:
    disparity = np.full((1, 12), 1.0)
    disparity[0, 6:9] = 4.0
    expected = np.ones(12, dtype=bool)
    expected[0] = False  # leaves the right image
    expected[3:6] = False  # 4 - 1 pixels hidden behind the foreground
    np.testing.assert_array_equal(stereo_matched(disparity)[0], expected)


def test_noise_is_continuous_and_keeps_to_its_table() -> None:
    a = np.linspace(-5.0, 70.0, 75_001)
    values = value_noise(NOISE, a, 0.3 * a)
    assert np.abs(np.diff(values)).max() < 0.01
    assert NOISE.min() <= values.min()
    assert values.max() <= NOISE.max()
    assert value_noise(NOISE, np.array([-1.0]), np.array([66.0]))[0] == NOISE[63, 2]


# Learnability


def _features(scene: dict[str, np.ndarray], pixels: np.ndarray, *, position: bool) -> np.ndarray:
    """RGB, its blur, and the position in the image, with all products of two of them."""
    image = scene["image"].astype(float)
    height, width, _ = image.shape
    blurred = image.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))
    blurred = blurred.repeat(8, axis=0).repeat(8, axis=1)
    rows, columns = np.mgrid[:height, :width]
    down, across = rows / height - 0.5, np.abs(columns / width - 0.5)
    place = np.stack([down, across, down**2, across**2], axis=-1)
    columns = [image, blurred, place] if position else [image]
    linear = np.concatenate(columns, axis=-1).reshape(height * width, -1)[pixels]
    linear = np.concatenate([np.ones((len(linear), 1)), linear], axis=1)
    upper = np.triu_indices(linear.shape[1])
    return (linear[:, :, None] * linear[:, None, :])[:, upper[0], upper[1]]


def _ridge(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    gram = features.T @ features + 1e-2 * np.eye(features.shape[1])
    return np.linalg.solve(gram, features.T @ targets)


def test_a_linear_model_beats_a_constant_in_unseen_streets_and_colour_alone_does_not_suffice(
    scenes: list[dict[str, np.ndarray]],
) -> None:
    rng = np.random.default_rng(0)
    valid = [
        np.flatnonzero((scene["label_7"] >= 0) & (scene["depth"][..., 0] > 0)) for scene in scenes
    ]
    pixels = [rng.choice(each, min(300, len(each)), replace=False) for each in valid]
    pairs = list(zip(scenes, pixels, strict=True))
    labels = [scene["label_7"].reshape(-1)[at] for scene, at in pairs]
    depths = [scene["depth"].reshape(-1)[at] for scene, at in pairs]
    train, val = slice(0, 48), slice(48, 64)

    label, depth = np.concatenate(labels[val]), np.concatenate(depths[val])
    common = np.bincount(np.concatenate(labels[train])).argmax()
    constant_accuracy = (label == common).mean()
    constant_error = np.abs(depth - np.median(np.concatenate(depths[train]))).mean()
    accuracy, error = {}, {}
    for position in (False, True):
        features = [_features(scene, at, position=position) for scene, at in pairs]
        known, unseen = np.concatenate(features[train]), np.concatenate(features[val])
        scores = unseen @ _ridge(known, np.eye(7)[np.concatenate(labels[train])])
        accuracy[position] = (scores.argmax(axis=1) == label).mean()
        fitted = unseen @ _ridge(known, np.concatenate(depths[train]))
        error[position] = np.abs(fitted - depth).mean()
    summary = (constant_accuracy, accuracy, constant_error, error)
    assert accuracy[True] > constant_accuracy + 0.15, summary
    assert error[True] < 0.5 * constant_error, summary
    assert accuracy[False] < accuracy[True] - 0.08, summary
    assert error[False] > 1.5 * error[True], summary
