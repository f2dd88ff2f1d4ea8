"""Shards: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from repmtl_ray import storage
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import DataConfig
from repmtl_ray.data import manifest, shards
from repmtl_ray.data.batches import LocalRows, eval_batches, train_batches
from repmtl_ray.data.sources import image_size, open_streams
from repmtl_ray.data.storage_rows import StorageRows
from tests.helpers.layouts import (
    dense_stream,
    domain_stream,
    make_cityscapes,
    make_office,
    make_store,
)
from tests.helpers.paths import ROOT


def npy_and_shards(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The same training split from npy files and from shards."""
    make_cityscapes(folder / "npy", **options)
    npy = {
        split: open_streams(DataConfig(name="cityscapes", path=str(folder / "npy")), split)
        for split in ("train", "val")
    }
    root = make_store(folder / "shards", npy)
    return npy["train"][0], open_streams(DataConfig(name="cityscapes", path=root), "train")[0]


def assert_same_sample(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, strict=True)


def test_dense_samples_come_back_to_the_bit(tmp_path: Path) -> None:
    npy, stored = npy_and_shards(tmp_path, num_train=11)
    assert (stored.name, stored.kinds, stored.num_samples, stored.normalize) == (
        npy.name,
        npy.kinds,
        11,
        None,
    )
    for index in [10, 0, 3, 4, 7, 8, 3]:
        assert_same_sample(stored.load(index), npy.load(index))
        assert_same_sample(stored.reload(index), npy.load(index))
    assert image_size(DataConfig(name="cityscapes", path=str(tmp_path / "shards"))) == (8, 16)


def test_office_samples_come_back_to_the_bit_in_the_order_asked_for(tmp_path: Path) -> None:
    make_office(tmp_path / "jpg", per_class={"amazon": 5, "dslr": 4}, classes={"mug": 3, "bike": 1})
    data = DataConfig(
        name="office31", path=str(tmp_path / "jpg"), domains=("dslr", "amazon"), height=16, width=16
    )
    photographs = open_streams(data, "train")
    root = make_store(tmp_path / "shards", {"train": photographs}, name="office31")
    again = DataConfig(name="office31", path=root, domains=("amazon", "dslr"))
    amazon, dslr = open_streams(again, "train")
    for stored, expected in ((dslr, photographs[0]), (amazon, photographs[1])):
        assert (stored.name, stored.kinds, stored.normalize, stored.classes) == (
            expected.name,
            expected.kinds,
            expected.normalize,
            expected.classes,
        )
        for index in range(expected.num_samples):
            assert_same_sample(stored.load(index), expected.load(index))


def test_any_parquet_reader_gets_the_arrays(tmp_path: Path) -> None:
    npy, _ = npy_and_shards(tmp_path)
    table = parquet.read_table(tmp_path / "shards/train/cityscapes-0.parquet")
    assert table.column_names == ["sample_id", "image", "segmentation", "depth"]
    for name in ("image", "segmentation", "depth"):
        metadata = table.schema.field(name).metadata
        values = np.frombuffer(table.column(name)[2].as_py(), metadata[b"dtype"].decode())
        expected = npy.load(2)[name]
        assert json.loads(metadata[b"shape"]) == list(expected.shape)
        np.testing.assert_array_equal(values.reshape(expected.shape), expected)


def test_only_columns_that_shrink_are_compressed(tmp_path: Path) -> None:
    sample = {
        "sample_id": np.array(0),
        "image": np.random.default_rng(0).random((32, 32, 3), dtype=np.float32),
        "segmentation": np.zeros((32, 32), np.int16),
    }
    shards.write_shard(str(tmp_path), "a.parquet", [sample], [0])
    group = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    assert [group.column(i).compression for i in range(3)] == [
        "UNCOMPRESSED",
        "UNCOMPRESSED",
        "LZ4",
    ]


@pytest.mark.parametrize(("height", "num_rows"), [(8, 85), (512, 1)])
def test_a_row_group_is_one_sample_unless_samples_are_small(
    tmp_path: Path, height: int, num_rows: int
) -> None:
    image = np.zeros((height, 64, 3), np.uint8)
    samples = [{"sample_id": np.array(i), "image": image} for i in range(90)]
    shards.write_shard(str(tmp_path), "a.parquet", samples, list(range(90)))
    group = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    assert group.num_rows == num_rows


OPTIONS: dict[str, Any] = {"tasks": ["segmentation", "depth"], "dtype": torch.float32}


def images(batches: Any) -> list[Any]:
    return [(batch.images, batch.targets, batch.sample_ids) for batch in batches]


@pytest.mark.parametrize("num_threads", [1, 5])
@pytest.mark.parametrize("per_shard", [1, 3, 100])
def test_streamed_shards_give_the_batches_of_samples_in_memory(
    tmp_path: Path, per_shard: int, num_threads: int
) -> None:
    stream = dense_stream(13)
    root = make_store(tmp_path, {"train": [stream]}, per_shard=per_shard)
    (stored,) = open_streams(DataConfig(name="cityscapes", path=root), "train")
    for rank in range(2):
        options = OPTIONS | {"workers": Workers(rank, 2), "batch_size": 4}
        more = options | {"seed": 3, "epoch": 1, "augment": True}
        kept, read = (
            [
                *images(train_batches((one,), {"cityscapes": rows}, **more)),
                *images(eval_batches((one,), {"cityscapes": rows}, **options)),
            ]
            for one, rows in (
                (stream, LocalRows(stream)),
                (stored, StorageRows(stored, num_threads=num_threads)),
            )
        )
        assert len(kept) == len(read) == 5
        for one, other in zip(kept, read, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[2], other[2])
            assert all(torch.equal(one[1][task], other[1][task]) for task in OPTIONS["tasks"])


def test_an_epoch_of_streamed_samples_has_each_once(tmp_path: Path) -> None:
    streams = (domain_stream("amazon", 12), domain_stream("dslr", 6))
    rows = {stream.name: StorageRows(stream) for stream in streams}
    batches = list(
        train_batches(
            streams,
            rows,
            tasks=["amazon", "dslr"],
            batch_size=3,
            seed=0,
            epoch=2,
            workers=ALONE,
            augment=False,
            dtype=torch.float32,
        )
    )
    ids = {
        name: [int(i) for batch in batches for i in batch.sample_ids[batch.rows[name]]]
        for name in rows
    }
    assert sorted(ids["amazon"]) == list(range(12))
    assert sorted(ids["dslr"]) == sorted(2 * list(range(6)))


def test_an_epoch_that_is_given_up_leaves_no_thread() -> None:
    stream = dense_stream(13)
    rows = StorageRows(stream)
    options = OPTIONS | {"batch_size": 2, "workers": ALONE, "seed": 0, "epoch": 0, "augment": True}
    of_other_tests = set(threading.enumerate())
    batches = train_batches((stream,), {"cityscapes": rows}, **options)
    next(batches)
    assert {"batches", "reading_0"} <= {thread.name for thread in threading.enumerate()}
    assert isinstance(batches, Generator)
    batches.close()
    del rows, batches
    gc.collect()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _threads(of_other_tests):
        time.sleep(0.01)
    assert _threads(of_other_tests) == []


def _threads(besides: set[threading.Thread]) -> list[str]:
    ours = ("batches", "reading")
    new = set(threading.enumerate()) - besides
    return [thread.name for thread in new if thread.name.startswith(ours)]


def test_an_error_of_a_reading_thread_reaches_the_caller() -> None:
    def load(index: int) -> Any:
        if index == 3:
            raise ValueError("sample 3 is broken")
        return stream.load(index)

    stream = dense_stream(5)
    rows = StorageRows(type(stream)(name="a", kinds=stream.kinds, num_samples=5, load=load))
    with pytest.raises(ValueError, match="sample 3 is broken"):
        rows.fetch(np.arange(5))


def test_streams_of_shards_survive_pickling(tmp_path: Path) -> None:
    npy, stored = npy_and_shards(tmp_path)
    stored.load(0)
    assert_same_sample(pickle.loads(pickle.dumps(stored)).load(4), npy.load(4))


# Bad input


def broken(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a store's manifest."""
    file = root / manifest.FILE
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def stream_of(values: dict[str, Any]) -> dict[str, Any]:
    return values["splits"]["train"]["cityscapes"]


def shard_of(values: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return stream_of(values)["shards"][number]


def no_shards(values: dict[str, Any]) -> None:
    stream_of(values).update(shards=[], num_samples=0)


def repeated(values: dict[str, Any]) -> None:
    listed = stream_of(values)["shards"]
    listed.append(listed[0] | {"first": 9, "last": 12})
    stream_of(values)["num_samples"] += listed[0]["num_samples"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "has version 2; this repmtl_ray reads up to 1: update it"),
        (lambda m: m.update(version="1"), "has version '1', expected 1"),
        (lambda m: m.update(format="other"), "format 'other', expected 'repmtl_ray shards'"),
        (lambda m: m.pop("splits"), "splits is missing from Manifest. Prepare the data"),
        (lambda m: shard_of(m).update(path="../x.parquet"), "'../x.parquet', which is not below"),
        (lambda m: shard_of(m).update(path="/etc/passwd"), "'/etc/passwd', which is not below"),
        (lambda m: shard_of(m).update(path="a/../../x"), "'a/../../x', which is not below"),
        (lambda m: shard_of(m).update(path="s3://b/x"), "'s3://b/x', which is not below"),
        (lambda m: shard_of(m).update(path="..\\x"), "which is not below its root"),
        (lambda m: shard_of(m).update(num_samples=-4), "num_samples is -4; expected at least 0"),
        (lambda m: shard_of(m).update(num_samples=3), "announces 5 samples, its shards have 4"),
        (lambda m: shard_of(m).update(sha256="0"), "has no SHA-256 digest"),
        (lambda m: shard_of(m, 1).update(first=3), "two samples with one id"),
        (lambda m: stream_of(m)["columns"].pop("depth"), "has no column 'depth'"),
        (
            lambda m: stream_of(m)["kinds"].update(depth="heat"),
            "kinds.depth is 'heat'; expected one of",
        ),
        (repeated, r"names the shard train/cityscapes-0\.parquet twice: two samples with one id"),
        (no_shards, "train/cityscapes is empty: a stream has at least one sample"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    root = make_store(tmp_path, {"train": [dense_stream(5)]})
    broken(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_streams(DataConfig(name="cityscapes", path=root), "train")


def loaded(root: str, index: int = 2) -> Any:
    return open_streams(DataConfig(name="cityscapes", path=root), "train")[0].load(index)


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def replace_by_a_link(file: Path) -> None:
    elsewhere = file.parents[2] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"cityscapes-0\.parquet is not what the manifest's digest is of; .* damaged"),
        (cut, r"cityscapes-0\.parquet has \d+ bytes, the manifest says \d+; .* copy it again"),
        (Path.unlink, r"cityscapes-0\.parquet: there is no such file"),
        (replace_by_a_link, "is a link that leaves the store"),
    ],
)
def test_a_damaged_shard_is_named_and_not_read(tmp_path: Path, damage: Any, message: str) -> None:
    root = make_store(tmp_path / "store", {"train": [dense_stream(5)]})
    damage(tmp_path / "store/train/cityscapes-0.parquet")
    with pytest.raises(ValueError, match=message):
        loaded(root)


def test_a_digest_is_also_taken_of_a_file_that_was_open_before(tmp_path: Path) -> None:
    root = make_store(tmp_path, {"train": [dense_stream(5)]})
    flip_a_byte(tmp_path / "train/cityscapes-0.parquet")
    (stream,) = open_streams(DataConfig(name="cityscapes", path=root), "train")
    assert stream.reload is not None
    stream.reload(0)
    with pytest.raises(ValueError, match="is not what the manifest's digest is of"):
        stream.load(0)


def test_a_truncated_parquet_with_a_manifest_that_agrees_is_an_error(tmp_path: Path) -> None:
    root = make_store(tmp_path, {"train": [dense_stream(5)]})
    file = tmp_path / "train/cityscapes-0.parquet"
    cut(file)

    def agree(values: dict[str, Any]) -> None:
        data = file.read_bytes()
        shard_of(values).update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    broken(tmp_path, agree)
    with pytest.raises(ValueError, match=r"cityscapes-0\.parquet is no Parquet file"):
        loaded(root)


def test_columns_of_another_size_are_an_error(tmp_path: Path) -> None:
    root = make_store(tmp_path, {"train": [dense_stream(5)]})
    broken(tmp_path, lambda m: stream_of(m)["columns"]["image"].update(shape=[6, 9, 3]))
    with pytest.raises(ValueError, match=r"'image' is fixed_size_binary.*, expected 648 bytes"):
        loaded(root)


def test_a_store_says_what_it_has(tmp_path: Path) -> None:
    root = make_store(tmp_path, {"train": [dense_stream(5)], "val": [dense_stream(2)]})

    def opened(split: Any = "train", **options: Any) -> None:
        open_streams(DataConfig(**({"name": "cityscapes", "path": root} | options)), split)

    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        opened("test")
    with pytest.raises(ValueError, match=r"holds cityscapes, but data\.name is 'office31'"):
        opened(name="office31")
    with pytest.raises(ValueError, match=r"of train/cityscapes are 6 x 10, .* ask for 12 x 10"):
        opened(height=12, width=10)


def test_a_store_without_a_manifest_is_not_read(tmp_path: Path) -> None:
    make_store(tmp_path, {"train": [dense_stream(5)]})
    (tmp_path / manifest.FILE).unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json: .* preparation did not finish"):
        manifest.read(str(tmp_path))


FULL = """
import resource, sys
from tests.helpers.layouts import make_store, dense_stream
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    make_store(sys.argv[1], {"train": [dense_stream(9)]}, per_shard=9)
except ValueError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_no_half_written_file(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    root = ROOT
    command = [sys.executable, "-c", FULL, str(tmp_path / "store")]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "the disk is full" in found.stdout, found.stderr
    assert "make room and run the same command again" in found.stdout
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["train"]


def test_locations_keep_their_query() -> None:
    assert storage.join("s3://b/a?region=x", "c", "d.json") == "s3://b/a/c/d.json?region=x"
    assert storage.join("/data/a#?/", "c") == "/data/a#?/c"
