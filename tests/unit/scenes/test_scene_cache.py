"""The cache of rendered scenes: layout, damaged files, several writers, and folders that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repmtl_ray.scenes import scene_cache
from repmtl_ray.scenes.rooms import ROOMS
from repmtl_ray.scenes.scene_cache import (
    VAL_OFFSET,
    Renderer,
    Scene,
    Series,
    fill_cache,
    read_scene,
)
from repmtl_ray.scenes.streets import STREETS

SMALL = Series(renderer=STREETS, num_train=3, num_val=1, height=16, width=32, seed=5)
SERIES = [SMALL, dataclasses.replace(SMALL, renderer=ROOMS)]

both_data_sets = pytest.mark.parametrize("series", SERIES, ids=lambda series: series.renderer.name)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_renderer(series: Series) -> Series:
    """The same series, of which no scene can be rendered any more."""

    def refuse(*_: int, **__: int) -> Scene:
        raise AssertionError("a scene was rendered")

    return dataclasses.replace(series, renderer=dataclasses.replace(series.renderer, render=refuse))


@both_data_sets
def test_a_folder_holds_every_scene_of_the_splits_that_were_asked_for(
    series: Series, cache: Path
) -> None:
    folder = fill_cache(series, "train")
    assert not (folder / "val").exists()
    assert fill_cache(series, "val") == folder
    assert folder.parent == cache
    assert folder.name.startswith(f"{series.renderer.name}-")
    numbers = [("train", 0), ("train", 1), ("train", 2), ("val", 0)]
    expected = {
        f"{split}/{column}/{number}.npy"
        for split, number in numbers
        for column in series.renderer.columns
    }
    assert contents(folder).keys() == expected | {"scenes.json"}
    assert json.loads((folder / "scenes.json").read_text())["num_train"] == 3
    for split, number in numbers:
        index = number + (VAL_OFFSET if split == "val" else 0)
        scene = series.renderer.render(5, index, height=16, width=32)
        for column, values in scene.items():
            stored = np.load(folder / split / column / f"{number}.npy")
            np.testing.assert_array_equal(stored, values)
            assert stored.dtype == values.dtype


@both_data_sets
def test_a_renderers_columns_are_what_it_renders(series: Series) -> None:
    scene = series.render("val", 0)
    assert scene.keys() == series.renderer.columns.keys()
    for column, values in scene.items():
        assert values.dtype == series.renderer.columns[column][0]
        assert values.shape == series.shape(column)


@pytest.mark.parametrize(
    ("renderer", "index", "means"),
    [
        (STREETS, 0, {"image": 0.3399, "label_7": 2.1453, "depth": 0.1371}),
        (STREETS, 1, {"image": 0.3924, "label_7": 2.1049, "depth": 0.0339}),
        (ROOMS, 0, {"image": 129.1166, "label": 8.67, "depth": 2.6651, "normal": 0.2233}),
        (ROOMS, 1, {"image": 103.099, "label": 6.6131, "depth": 3.818, "normal": 0.2266}),
    ],
)
def test_the_pixels_of_version_1_stay_as_they_are(
    renderer: Renderer, index: int, means: dict[str, float]
) -> None:
    """Whoever changes a pixel raises the renderer's version, and the numbers here."""
    assert renderer.version == 1
    scene = renderer.render(0, index, height=48, width=64)
    for column, mean in means.items():
        values = scene[column]
        valid = values[values >= 0] if column.startswith("label") else values
        assert valid.mean(dtype=np.float64) == pytest.approx(mean, rel=2e-3), column


@both_data_sets
def test_a_complete_split_is_read_and_never_rendered_again(series: Series) -> None:
    folder = fill_cache(series, "train")
    known = without_renderer(pickle.loads(pickle.dumps(series)))
    assert fill_cache(known, "train") == folder
    for number in range(3):
        for column, values in read_scene(known, folder, "train", number).items():
            np.testing.assert_array_equal(values, series.render("train", number)[column])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut inside its header": lambda path: path.write_bytes(path.read_bytes()[:9]),
    "empty": lambda path: path.write_bytes(b""),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another size": lambda path: np.save(path, np.load(path)[:-1]),
    "another type": lambda path: np.save(path, np.load(path).astype(np.float64)),
    "not an array": lambda path: path.write_text("<html>proxy error</html>"),
}


@both_data_sets
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_rendered_again_and_said_in_one_line(
    series: Series, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fill_cache(series, "train")
    before = contents(folder)
    column = list(series.renderer.columns)[-1]
    DAMAGE[kind](folder / "train" / column / "1.npy")
    damaged = contents(folder)
    assert damaged != before
    for name, values in read_scene(series, folder, "train", 1).items():
        np.testing.assert_array_equal(values, series.render("train", 1)[name])
    assert contents(folder) == damaged, "a reader does not write"
    with caplog.at_level(logging.WARNING):
        fill_cache(series, "train")
    (record,) = caplog.records
    assert f"damaged files in the cache: 1 (train/{column}/1.npy: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert contents(folder) == before


def test_a_missing_file_is_rendered_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    folder = fill_cache(SMALL, "train")
    before = contents(folder)
    (folder / "train" / "depth" / "2.npy").unlink()
    with caplog.at_level(logging.WARNING):
        fill_cache(SMALL, "train")
    assert not caplog.records
    assert contents(folder) == before


def test_an_interrupted_rendering_is_continued_where_it_stopped() -> None:
    numbers: list[int] = []

    def interrupted_at_the_third(seed: int, number: int, *, height: int, width: int) -> Scene:
        numbers.append(number)
        if len(numbers) == 3:
            raise KeyboardInterrupt
        return STREETS.render(seed, number, height=height, width=width)

    renderer = dataclasses.replace(STREETS, render=interrupted_at_the_third)
    series = dataclasses.replace(SMALL, renderer=renderer)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(series, "train")
    fill_cache(series, "train")
    assert numbers == [0, 1, 2, 2]


def test_a_reader_never_sees_a_part_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process looks while the first has written half of a file's bytes."""
    folder = fill_cache(SMALL, "train")
    damaged = folder / "train" / "image" / "0.npy"
    damaged.write_bytes(b"")
    write_bytes, seen = Path.write_bytes, []

    def write_in_two_halves(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        seen.append(damaged.read_bytes())
        return write_bytes(path, content)

    monkeypatch.setattr(scene_cache.Path, "write_bytes", write_in_two_halves)
    fill_cache(SMALL, "train")
    assert seen[0] == b"", "the file is as it was until the new one is whole"
    assert len(damaged.read_bytes()) > 128
    assert not [path for path in contents(folder) if "/." in path], "no draft is left"


def test_a_full_disk_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene_cache.Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"No space left on device.*REPMTL_RAY_CACHE"):
        fill_cache(SMALL, "train")


def test_a_complete_cache_that_cannot_be_written_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill_cache(SMALL, "train")

    def read_only(path: Path, content: bytes) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(scene_cache.Path, "write_bytes", read_only)
    assert fill_cache(SMALL, "train") == folder
    with pytest.raises(ValueError, match=r"Read-only file system.*REPMTL_RAY_CACHE"):
        fill_cache(SMALL, "val")


def test_the_cache_is_in_the_home_directory_unless_the_variable_says_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REPMTL_RAY_CACHE", "")
    folder = scene_cache.cache_folder(SMALL)
    assert folder.parent == tmp_path / "home" / ".cache" / "repmtl_ray"
    monkeypatch.setenv("REPMTL_RAY_CACHE", "~/scenes")
    assert scene_cache.cache_folder(SMALL).parent == tmp_path / "home" / "scenes"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPMTL_RAY_CACHE", "relative")
    assert scene_cache.cache_folder(SMALL).parent == tmp_path / "relative"
    monkeypatch.setenv("REPMTL_RAY_CACHE", "~nobody-of-this-name/scenes")
    with pytest.raises(ValueError, match=r"cannot be stored in the cache: .*REPMTL_RAY_CACHE"):
        scene_cache.cache_folder(SMALL)


def test_other_parameters_and_other_renderers_have_other_folders() -> None:
    newer = dataclasses.replace(STREETS, version=STREETS.version + 1)
    others = [{"num_val": 2}, {"height": 32}, {"seed": 6}, {"renderer": newer}]
    series = [SMALL, *(dataclasses.replace(SMALL, **other) for other in others), SERIES[1]]
    assert len({scene_cache.cache_folder(each) for each in series}) == 6


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": 0}, {"height": 8}, {"seed": -1}])
def test_a_series_refuses_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"street_scenes: {next(iter(wrong))} is"):
        dataclasses.replace(SMALL, **wrong)
