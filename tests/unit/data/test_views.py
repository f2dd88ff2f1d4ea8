"""albumentations and its twin on OpenCV give the same views to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from repmtl_ray.data import augment as augmentation
from repmtl_ray.data import views
from repmtl_ray.data.augment import augment
from repmtl_ray.data.stream import Kind
from repmtl_ray.data.views_albumentations import by_albumentations
from tests.unit.data.test_augment import KINDS, sample

SIZES = [(16, 32), (37, 53), (64, 64), (128, 256)]


@pytest.fixture(autouse=True)
def choose_again() -> Iterator[None]:
    """The choice is made once per process."""
    augmentation.geometry.cache_clear()
    yield
    augmentation.geometry.cache_clear()


def view(geometry: views.Geometry, before: Any, seed: int, kinds: dict[str, Kind]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "geometry", lambda: geometry)
        return augment(before, rng=np.random.default_rng(seed), kinds=kinds)


@pytest.mark.parametrize("bytes_", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_both_give_the_same_bits_for_every_kind_of_target(
    height: int, width: int, bytes_: bool
) -> None:
    seen = set()
    for seed in range(60):
        before = sample(np.random.default_rng(seed), height, width, bytes_=bytes_)
        old, twin = (
            view(geometry, before, seed, KINDS) for geometry in (by_albumentations, views.by_opencv)
        )
        seen.add(old["segmentation"].tobytes() == before["segmentation"].tobytes())
        assert old.keys() == twin.keys()
        for name in old:
            assert old[name].dtype == twin[name].dtype, name
            np.testing.assert_array_equal(old[name], twin[name], err_msg=f"{name}, seed {seed}")
            assert old[name].tobytes() == twin[name].tobytes(), name  # -0.0 is not 0.0 here
    assert seen == {True, False}, "whole images and windows both came up"


@pytest.mark.parametrize("kept", [("image",), ("image", "normal"), ("image", "metres", "domain")])
def test_both_take_any_targets(kept: tuple[str, ...]) -> None:
    kinds = {name: KINDS[name] for name in kept}
    for seed in range(20):
        whole = sample(np.random.default_rng(seed))
        before = {name: whole[name] for name in kept}
        old = view(by_albumentations, before, seed, kinds)
        np.testing.assert_equal(view(views.by_opencv, before, seed, kinds), old)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_both_take_every_type_of_label(dtype: type) -> None:
    labels = np.random.default_rng(0).integers(0, 100, (20, 30)).astype(dtype)
    arrays = {"image": np.zeros((20, 30, 3), dtype=np.uint8), "label": labels}
    columns: views.Columns = (("image", "image"), ("label", "mask"))
    for flip in (False, True):
        one, other = (
            geometry(arrays, columns, (3, 2, 23, 15), flip)["label"]
            for geometry in (by_albumentations, views.by_opencv)
        )
        assert one.dtype == other.dtype == dtype
        np.testing.assert_array_equal(one, other)


def test_albumentations_is_used_where_it_is_installed_and_the_twin_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert augmentation.geometry() is by_albumentations
    augmentation.geometry.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert augmentation.geometry() is views.by_opencv
