"""Data actors in a process of their own, for every source: their batches are those of the worker's
threads, to the bit, and two workers together see every sample once in an evaluation."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray.collectives import Workers
from repmtl_ray.config import DataConfig
from repmtl_ray.data.batches import planned_batches, planned_eval_batches
from repmtl_ray.data.cache import UncachedSplit
from repmtl_ray.data.data_actor import RunBatches, packed_batches
from repmtl_ray.data.plan import EvalBatches, EvalPlan, PackedPart, TrainBatches, TrainPlan
from repmtl_ray.data.sources import open_streams
from tests.helpers import forms, s3
from tests.helpers.layouts import make_cityscapes, make_office, make_store
from tests.helpers.other_process import made_elsewhere


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3.S3]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.KEYS.items():
            patch.setenv(name, value)
        with s3.serving() as server:
            yield server


@pytest.fixture(scope="module")
def pool(bucket: s3.S3) -> Iterator[ProcessPoolExecutor]:
    """One process, which knows the keys of the bucket."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        yield executor


SIZE = {"height": forms.HEIGHT, "width": forms.WIDTH}
Made = Callable[[Path, s3.S3], DataConfig]


def stored(root: Path, target: str) -> DataConfig:
    data = DataConfig(name="cityscapes", path=str(make_cityscapes(root / "npy")))
    splits = {split: open_streams(data, split) for split in ("train", "val")}
    return DataConfig(name="cityscapes", path=make_store(target, splits))


def office(root: Path) -> DataConfig:
    domains = ("amazon", "dslr")
    classes, per_class = {"bike": 0, "mug": 1}, {"amazon": 8, "dslr": 6}
    make_office(root, per_class=per_class, classes=classes, lists=None, images="")
    return DataConfig(name="image_folders", path=str(root), domains=domains, height=16, width=16)


SOURCES: dict[str, Made] = {
    "npy folders": lambda root, _: DataConfig(
        name="nyuv2", path=str(forms.make_npy(root, "nyuv2"))
    ),
    "Parquet mirror": lambda root, _: DataConfig(
        name="nyuv2", path=str(forms.make_parquet(root, "nyuv2"))
    ),
    "official PNG": lambda root, _: DataConfig(
        name="cityscapes", path=str(forms.make_official_cityscapes(root)), **SIZE
    ),
    "official .mat": lambda root, _: DataConfig(
        name="nyuv2", path=str(forms.make_mat(root)), height=24, width=32
    ),
    "photographs in folders": lambda root, _: office(root),
    "shards on a disk": lambda root, _: stored(root, str(root / "shards")),
    "shards in a bucket": lambda root, server: stored(root, server.uri("shards")),
}


def batches_of(data: DataConfig, workers: Workers) -> RunBatches:
    train, evaluation = (
        UncachedSplit(
            streams=open_streams(data, split), num_bytes=1, fingerprint="", labelled=frozenset()
        )
        for split in ("train", "val")
    )
    tasks = tuple(task for stream in train.streams for task in stream.tasks)
    shared: dict[str, Any] = {"tasks": tasks, "workers": workers}
    return RunBatches(
        train=TrainPlan(streams=train.streams, batch_size=2, seed=3, augment=True, **shared),
        evaluation=EvalPlan(streams=evaluation.streams, batch_size=2, **shared),
        train_split=train,
        eval_split=evaluation,
    )


@pytest.mark.parametrize("source", SOURCES)
def test_batches_of_every_source_are_those_of_the_workers_threads(
    source: str, tmp_path: Path, bucket: s3.S3, pool: ProcessPoolExecutor
) -> None:
    data = SOURCES[source](tmp_path, bucket)
    dtype, evaluated = torch.float32, []
    for rank in (0, 1):
        batches = batches_of(data, Workers(rank, 2))
        table = made_elsewhere(pool, batches, batches.num_epoch)
        train, evaluation = TrainBatches(batches.train, {}), EvalBatches(batches.evaluation, {})
        train_rows = {s.name: batches.train_split.rows(s) for s in batches.train.selected}
        eval_rows = {s.name: batches.eval_split.rows(s) for s in batches.evaluation.selected}
        expected = [
            *planned_batches(batches.train, train_rows, epoch=0, dtype=dtype),
            *planned_eval_batches(batches.evaluation, eval_rows, dtype=dtype),
        ]
        found = list(packed_batches(table))
        assert [number for number, _ in found] == list(range(len(expected)))
        for (number, parts), other in zip(found, expected, strict=True):
            place = number - batches.train.num_steps
            streams = train.plan.selected if place < 0 else (evaluation.stream_of(place),)
            packed = [PackedPart(s, dict(part)) for s, part in zip(streams, parts, strict=True)]
            batch = (train if place < 0 else evaluation).unpack(packed, dtype)
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.sample_ids, other.sample_ids)
            assert batch.targets.keys() == other.targets.keys()
            assert all(torch.equal(batch.targets[t], v) for t, v in other.targets.items())
            if place >= 0:
                evaluated += [(streams[0].name, n) for n in batch.sample_ids.tolist()]
    whole = {stream.name: stream.num_samples for stream in open_streams(data, "val")}
    assert sorted(evaluated) == sorted((name, n) for name, num in whole.items() for n in range(num))
