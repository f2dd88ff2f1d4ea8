"""Rendered scenes on nodes without the driver's folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from repmtl_ray import cluster
from repmtl_ray.config import DataConfig, Experiment, ModelConfig
from repmtl_ray.data.sources import open_streams
from repmtl_ray.prepared_run import prepare_run

SIZES = {"height": 16, "width": 32, "num_train": 3, "num_val": 2, "scene_seed": 5}
DATA = DataConfig(name="cityscapes", **SIZES)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["cityscapes", "nyuv2"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_node_without_the_folder_loads_the_same_samples(
    cache: Path, name: str, split: str
) -> None:
    (stream,) = open_streams(DataConfig(name=name, **SIZES), split)
    here = [stream.load(index) for index in range(stream.num_samples)]
    travelled = pickle.loads(pickle.dumps(stream))
    shutil.rmtree(cache)  # another machine's disk
    there = [travelled.load(index) for index in range(stream.num_samples)]
    assert not cache.exists()
    for sample, other in zip(here, there, strict=True):
        assert sample.keys() == other.keys()
        for name, values in sample.items():
            assert values.dtype == other[name].dtype
            np.testing.assert_array_equal(values, other[name])


def test_a_node_without_the_folder_needs_no_folder_that_can_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stream,) = open_streams(DATA, "train")
    here = stream.load(1)
    shutil.rmtree(cache)
    cache.write_text("a file where the cache should be")
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    np.testing.assert_array_equal(stream.load(1)["image"], here["image"])


@pytest.mark.parametrize("name", ["cityscapes", "nyuv2"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cache_that_cannot_be_made_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: Literal["train", "val"]
) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("/proc/nowhere", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        monkeypatch.setenv("REPMTL_RAY_CACHE", folder)
        with pytest.raises(ValueError, match=f"{folder}.*Set the .*REPMTL_RAY_CACHE") as caught:
            open_streams(DataConfig(name=name, **SIZES), split)
        assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_made_is_found_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "connect", start)
    monkeypatch.setenv("REPMTL_RAY_CACHE", "/proc/nowhere")
    experiment = Experiment(
        data=DATA, model=ModelConfig(encoder="test_efficientnet", head="linear"), batch_size=2
    )
    with pytest.raises(ValueError, match="REPMTL_RAY_CACHE"):
        prepare_run(experiment)
