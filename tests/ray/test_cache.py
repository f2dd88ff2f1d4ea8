"""With a real Ray: what the object store gives back is what the streams gave."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import DataConfig
from repmtl_ray.data import blocks, cache
from repmtl_ray.data.batches import LocalRows, train_batches
from repmtl_ray.data.cache import CachedSplit, cache_streams
from repmtl_ray.data.sources import Stream, open_streams
from repmtl_ray.runs.build import Split
from tests.helpers.forms import make_npy, make_parquet
from tests.helpers.layouts import make_cityscapes, make_office

pytestmark = pytest.mark.ray


def cityscapes(root: Path, **options: Any) -> tuple[Stream, ...]:
    make_cityscapes(root, **options)
    return open_streams(DataConfig(name="cityscapes", path=str(root)), "train")


def office(root: Path) -> tuple[Stream, ...]:
    make_office(root, per_class={"amazon": 5, "dslr": 3}, classes={"mug": 3, "bike": 1})
    data = DataConfig(
        name="office31", path=str(root), domains=("dslr", "amazon"), height=16, width=16
    )
    return open_streams(data, "train")


def assert_holds(split: CachedSplit, streams: tuple[Stream, ...]) -> None:
    assert split.streams == streams
    for stream in streams:
        rows, expected = split.rows(stream), LocalRows(stream)
        assert len(rows) == stream.num_samples
        indices = np.random.default_rng(0).integers(0, stream.num_samples, 30)
        for names in (None, ["image", stream.tasks[0]]):
            found = rows.fetch(indices, names)
            assert list(found) == (names or ["sample_id", "image", *stream.tasks])
            for name, values in expected.fetch(indices, names).items():
                np.testing.assert_array_equal(found[name], values, strict=True)
                found[name][...] = 0  # the caller's own, not the store's


@pytest.mark.parametrize("num_cpus", [0, 1])
def test_dense_samples_come_back(tmp_path: Path, num_cpus: int) -> None:
    streams = cityscapes(tmp_path, num_train=11)
    split = cache_streams(streams, num_cpus_per_task=num_cpus)
    assert_holds(split, streams)
    assert split.num_bytes == 11 * (8 * 16 * (12 + 2 + 4) + 8)


def test_office_samples_come_back(tmp_path: Path) -> None:
    streams = office(tmp_path)
    assert_holds(cache_streams(streams), streams)


@pytest.mark.parametrize("block_bytes", [1, 2 * 2312, 2**30])
def test_block_sizes_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(cache, "BLOCK_BYTES", block_bytes)
    streams = cityscapes(tmp_path, num_train=24)
    split = cache_streams(streams)  # at least two blocks for each of the cluster's four CPUs
    assert len(split.cached["cityscapes"].blocks) == {1: 24, 2 * 2312: 12, 2**30: 8}[block_bytes]
    assert_holds(split, streams)


def test_batches_from_the_store_are_those_from_files(tmp_path: Path) -> None:
    streams = office(tmp_path)
    split = cache_streams(streams)
    options = {
        "tasks": ["amazon", "dslr"],
        "batch_size": 3,
        "seed": 0,
        "epoch": 1,
        "workers": ALONE,
        "augment": True,
        "dtype": torch.float32,
    }
    stored, local = (
        list(train_batches(streams, rows, **options))
        for rows in (
            {stream.name: split.rows(stream) for stream in streams},
            {stream.name: LocalRows(stream) for stream in streams},
        )
    )
    assert len(stored) == len(local) == 2
    for one, other in zip(stored, local, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets["dslr"], other.targets["dslr"])


def test_other_processes_read_it_while_every_cpu_is_taken(tmp_path: Path) -> None:
    class Holder:
        def held(self) -> bool:
            return True

        def total(self, config: dict) -> float:
            split = config["data"]
            rows = split.rows(split.streams[0])
            return float(rows.fetch(np.arange(7))["depth"].sum())

    holders: list[Any] = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
    ray.get([holder.held.remote() for holder in holders])
    streams = cityscapes(tmp_path, num_train=7)
    split = cache_streams(streams)
    expected = float(LocalRows(streams[0]).fetch(np.arange(7))["depth"].sum())
    found = ray.get([holder.total.remote({"data": split}) for holder in holders], timeout=200)
    assert found == [expected, expected]
    for holder in holders:
        ray.kill(holder)


def test_a_task_can_make_it_and_another_use_it(tmp_path: Path) -> None:
    streams = cityscapes(tmp_path, num_train=5)

    class Driver:
        def cache(self) -> CachedSplit:
            self.split = cache_streams(streams)
            return self.split

    def depth(split: CachedSplit) -> np.ndarray:
        return split.rows(split.streams[0]).fetch(np.array([4]))["depth"]

    driver: Any = ray.remote(num_cpus=1)(Driver).remote()
    found = ray.get(ray.remote(num_cpus=1)(depth).remote(driver.cache.remote()), timeout=200)
    np.testing.assert_array_equal(found[0], streams[0].load(4)["depth"])
    ray.kill(driver)


def _spoil(root: Path, frame: int) -> None:
    file = root / f"train/depth/{frame}.npy"
    depth = np.load(file)
    depth[0] = np.nan
    np.save(file, depth)


def test_a_broken_sample_is_the_streams_error(tmp_path: Path) -> None:
    streams = cityscapes(tmp_path, num_train=9)
    _spoil(tmp_path, 5)
    with pytest.raises(ValueError, match=r"^cityscapes: train/depth/5\.npy has 16 values that are"):
        cache_streams(streams)


def test_all_broken_samples_are_counted(tmp_path: Path) -> None:
    streams = cityscapes(tmp_path, num_train=9)
    for frame in range(1, 8):
        _spoil(tmp_path, frame)
    with pytest.raises(ValueError, match="cityscapes: 7 of 9 samples cannot be used") as caught:
        cache_streams(streams)
    lines = str(caught.value).splitlines()
    assert [line.split()[1] for line in lines[1:6]] == [f"train/depth/{i}.npy" for i in range(1, 6)]
    assert lines[6:] == ["and 2 more"]


def test_sample_ids_must_be_the_numbers(tmp_path: Path) -> None:
    def index(*ids_of_blocks: list[int]) -> None:
        checksums = [np.zeros(len(ids), dtype=np.uint32) for ids in ids_of_blocks]
        summaries = [
            blocks.Summary(np.array(ids), contents, [])
            for ids, contents in zip(ids_of_blocks, checksums, strict=True)
        ]
        blocks.index_of(stream, (), summaries)

    (stream,) = cityscapes(tmp_path, num_train=4)
    with pytest.raises(ValueError, match=r"sample_id 2 came 2 times; .* unique"):
        index([0, 2], [1, 2])
    with pytest.raises(ValueError, match="are 0 to 4 over 4 samples; expected the numbers 0 to 3"):
        index([0, 2], [1, 4])
    with pytest.raises(ValueError, match="are 0 to 2 over 3 samples; expected the numbers 0 to 3"):
        index([2, 0], [1])


def test_the_fingerprint_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = cityscapes(tmp_path / "one", num_train=6)
    first = cache_streams(streams).fingerprint
    monkeypatch.setattr(cache, "BLOCK_BYTES", 1)
    again = cityscapes(tmp_path / "two", num_train=6)
    assert cache_streams(again).fingerprint == first
    file = tmp_path / "two/train/depth/3.npy"
    np.save(file, np.load(file) * np.float32(0.5))
    assert cache_streams(again).fingerprint != first


def test_reading_is_quiet_and_leaves_settings_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = ray.data.DataContext.get_current()
    before = (context.enable_progress_bars, logging.getLogger("ray.data").level)
    capfd.readouterr()
    cache_streams(cityscapes(tmp_path))
    assert capfd.readouterr() == ("", "")
    context = ray.data.DataContext.get_current()
    assert (context.enable_progress_bars, logging.getLogger("ray.data").level) == before


def test_too_much_for_the_store_is_announced() -> None:
    with pytest.warns(UserWarning, match=r"take 0\.5 GiB, the smallest object store .* 0\.2 GiB"):
        cache.warn_if_large(2**29)


def test_equal_frames_have_one_fingerprint_in_every_form(tmp_path: Path) -> None:
    fingerprints = set()
    for form, make in (("npy", make_npy), ("parquet", make_parquet)):
        data = DataConfig(name="nyuv2", path=str(make(tmp_path / form, "nyuv2")), form=form)
        streams = open_streams(data, "train")
        split = cache_streams(streams)
        assert_holds(split, streams)
        rows = {stream.name: LocalRows(stream) for stream in streams}
        fingerprints |= {split.fingerprint, Split(streams=streams, rows=rows).fingerprint()}
    assert len(fingerprints) == 1
