"""Rendered rooms: what is promised of them, and that a network learns from them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repmtl_ray.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    RegularizerConfig,
)
from repmtl_ray.data.nyuv2 import CLASSES
from repmtl_ray.data.sources import image_size, open_streams
from repmtl_ray.scenes.room_layout import FOCAL
from repmtl_ray.scenes.rooms import render
from repmtl_ray.scenes.scene_cache import VAL_OFFSET
from tests.helpers.training import run, split

FLOOR, CEILING, WALL = (CLASSES.index(name) for name in ("floor", "ceiling", "wall"))
HEIGHT, WIDTH = 72, 96


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [render(0, index, height=HEIGHT, width=WIDTH) for index in range(48)]


def points_of(depth: np.ndarray) -> np.ndarray:
    """Where each pixel's surface is: x to the right, y up, z towards the camera."""
    height, width = depth.shape
    right = (np.arange(width) + 0.5 - width / 2) / (FOCAL * width)
    up = (height / 2 - np.arange(height) - 0.5) / (FOCAL * width)
    return np.stack([right * depth, up[:, None] * depth, -depth], axis=2)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 64), (50, 30)])
def test_a_room_keeps_the_nyuv2_contract(height: int, width: int) -> None:
    room = render(3, 1, height=height, width=width)
    assert list(room) == ["image", "label", "depth", "normal"]
    assert {name: (values.shape, values.dtype.name) for name, values in room.items()} == {
        "image": ((height, width, 3), "uint8"),
        "label": ((height, width), "int16"),
        "depth": ((height, width, 1), "float32"),
        "normal": ((height, width, 3), "float32"),
    }


def test_labels_depth_and_normals_are_in_range_and_invalid_together(scenes: list[Any]) -> None:
    for room in scenes:
        assert room["label"].min() >= -1
        assert room["label"].max() < 13
        depth, length = room["depth"][..., 0], np.linalg.norm(room["normal"], axis=2)
        np.testing.assert_array_equal(depth > 0, length > 0.5)
        np.testing.assert_allclose(length[depth > 0], 1, atol=1e-6)
        assert depth[depth > 0].min() > 0
        assert depth.max() < 9
        assert 0.01 < (depth == 0).mean() < 0.5


def test_normals_stand_on_the_surface_that_depth_shows(scenes: list[Any]) -> None:
    """Between two pixels of one plane, the way along the surface is perpendicular to the normal."""
    checked, right = 0, 0
    for room in scenes[:16]:
        points = points_of(room["depth"][..., 0].astype(np.float64))
        normals = room["normal"].astype(np.float64)
        for axis in (0, 1):
            count = points.shape[axis] - 1
            one, other = (np.take(points, range(at, count + at), axis) for at in (0, 1))
            n, m = (np.take(normals, range(at, count + at), axis) for at in (0, 1))
            plane = (n == m).all(axis=2) & n.any(axis=2)
            way = (other - one)[plane]
            off = np.abs((way * n[plane]).sum(axis=1)) / np.linalg.norm(way, axis=1)
            checked, right = checked + off.size, right + int(np.count_nonzero(off < 1e-3))
    assert checked > 50_000
    assert right / checked > 0.97  # the others step from a shelf to the wall behind, say


def test_normals_face_the_camera(scenes: list[Any]) -> None:
    for room in scenes:
        points, normals = points_of(room["depth"][..., 0]), room["normal"]
        assert (points * normals).sum(axis=2).max() < 1e-4


def test_floor_ceiling_and_walls_stand_as_they_do_in_a_house(scenes: list[Any]) -> None:
    for room in scenes:
        normals = {
            name: room["normal"][(room["label"] == label) & room["normal"].any(axis=2)]
            for name, label in (("floor", FLOOR), ("ceiling", CEILING), ("wall", WALL))
        }
        if len(normals["floor"]) == 0:
            continue
        up = normals["floor"][0]
        assert up[1] > 0.8  # and leans away from the camera, which looks down
        np.testing.assert_allclose(normals["floor"] @ up, 1, atol=1e-5)
        np.testing.assert_allclose(normals["ceiling"] @ up, -1, atol=1e-5)
        np.testing.assert_allclose(normals["wall"] @ up, 0, atol=1e-5)


def test_every_class_is_common_enough_to_matter(scenes: list[Any]) -> None:
    shown = {
        name: np.mean([(room["label"] == label).sum() > 10 for room in scenes])
        for label, name in enumerate(CLASSES)
    }
    assert min(shown.values()) > 0.15, shown
    pixels = np.bincount(np.concatenate([r["label"][r["label"] >= 0] for r in scenes]))
    assert pixels.max() / pixels.sum() < 0.55


def test_pictures_are_neither_dark_nor_washed_out(scenes: list[Any]) -> None:
    means = np.array([room["image"].mean() for room in scenes])
    assert 50 < np.median(means) < 200
    clipped = np.mean([(room["image"] == 255).all(axis=2).mean() for room in scenes])
    assert clipped < 0.1


def test_a_room_is_a_function_of_its_arguments() -> None:
    def look(*place: Any, height: int = 24, width: int = 32) -> Any:
        room = render(*place, height=height, width=width)
        return hashlib.sha256(b"".join(values.tobytes() for values in room.values())).hexdigest()

    assert look(0, 1) == look(0, 1)
    assert len({look(0, 1), look(0, 2), look(1, 1), look(0, VAL_OFFSET + 1)}) == 4


def test_two_sizes_show_the_same_view() -> None:
    for index in range(6):
        small, large = (
            render(4, index, height=24 * size, width=32 * size)["label"] for size in (1, 3)
        )
        middle = large[1::3, 1::3]
        both = (small >= 0) & (middle >= 0)
        assert (small == middle)[both].mean() > 0.97


@pytest.mark.parametrize("wrong", [{"height": 8}, {"width": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"render: {next(iter(wrong))} is"):
        render(0, 0, **{"height": 16, "width": 16} | wrong)


def test_without_a_path_rooms_are_rendered_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path))
    assert image_size(DataConfig(name="nyuv2")) == (288, 384)
    assert (DataConfig(name="nyuv2").num_train, DataConfig(name="nyuv2").num_val) == (795, 654)
    data = DataConfig(name="nyuv2", num_train=2, num_val=1, height=24, width=32)
    (train,), (val,) = open_streams(data, "train"), open_streams(data, "val")
    assert (train.num_samples, val.num_samples) == (2, 1)
    (root,) = tmp_path.iterdir()
    assert root.name.startswith("rooms-")
    expected = render(0, VAL_OFFSET, height=24, width=32)
    sample = val.load(0)
    np.testing.assert_array_equal(sample["image"], expected["image"])
    np.testing.assert_array_equal(sample["segmentation"], expected["label"])
    np.testing.assert_array_equal(sample["depth"], expected["depth"])
    np.testing.assert_allclose(sample["normal"], expected["normal"], atol=1e-6)
    with pytest.raises(ValueError, match="have no test split; evaluate on the split 'val'"):
        open_streams(data, "test")


@pytest.mark.slow
def test_a_trained_network_clearly_beats_the_best_constants_on_all_three_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path))
    experiment = Experiment(
        data=DataConfig(name="nyuv2", height=48, width=64, num_train=96, num_val=16),
        model=ModelConfig(encoder="test_efficientnet", head="linear"),
        regularizer=RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, halve_at_epoch=10),
        epochs=15,
        batch_size=8,
    )

    def pixels(name: str, column: Any) -> NDArray[Any]:
        stream = split(experiment, name).streams[0]
        return np.stack([stream.load(index)[column] for index in range(stream.num_samples)])

    labels, unseen = pixels("train", "segmentation"), pixels("val", "segmentation")
    common = np.bincount(labels[labels >= 0]).argmax()
    accuracy = 100 * (unseen[unseen >= 0] == common).mean()
    depths, unseen = pixels("train", "depth"), pixels("val", "depth")
    error = np.abs(unseen[unseen > 0] - np.median(depths[depths > 0])).mean()
    normals, unseen = pixels("train", "normal"), pixels("val", "normal")
    mean = normals[normals.any(axis=3)].mean(axis=0)
    cosine = unseen[unseen.any(axis=3)] @ (mean / np.linalg.norm(mean))
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()

    last = run(experiment).history[-1]
    assert last["segmentation/pixel_accuracy"] > accuracy + 10
    assert last["depth/abs_error"] < 0.8 * error
    assert last["normal/mean_angle"] < 0.75 * angle
