"""Rendered scenes on nodes without the driver's folder."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest

from repmtl_ray.config import DataConfig
from repmtl_ray.data.sources import open_streams
from repmtl_ray.scenes import street_scenes

SIZES = {"height": 16, "width": 32, "num_train": 3, "num_val": 2, "scene_seed": 5}
DATA = DataConfig(name="cityscapes", **SIZES)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["cityscapes", "nyuv2"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_node_without_the_folder_loads_the_same_samples(cache, name, split):
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


def test_a_node_with_the_folder_reads_it(cache, monkeypatch):
    (stream,) = open_streams(DATA, "train")
    monkeypatch.setattr(street_scenes, "render", None)  # a call would fail
    assert stream.load(2)["sample_id"] == 2
