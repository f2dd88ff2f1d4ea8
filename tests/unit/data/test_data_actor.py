"""What a data actor makes, without Ray: packed batches that travel in a table, and its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.data.batches import eval_batches, train_batches
from repmtl_ray.data.cache import UncachedSplit
from repmtl_ray.data.data_actor import (
    DataActor,
    RunBatches,
    out_of_memory,
    packed_batches,
    place_of,
)
from repmtl_ray.data.plan import DataError, EvalPlan, PackedPart, TrainPlan
from repmtl_ray.data.sampler import Place
from repmtl_ray.data.stream import Sample, Stream
from tests.helpers.layouts import domain_stream

STREAMS = (domain_stream("amazon", 11), domain_stream("dslr", 3))
OPTIONS: dict[str, Any] = {"tasks": ("amazon", "dslr"), "batch_size": 4, "workers": ALONE}


def batches_of(streams: tuple[Stream, ...]) -> RunBatches:
    split = UncachedSplit(streams=streams, num_bytes=1, fingerprint="", labelled=frozenset())
    return RunBatches(
        train=TrainPlan(streams=streams, seed=5, augment=True, **OPTIONS),
        evaluation=EvalPlan(streams=streams, **OPTIONS),
        train_split=split,
        eval_split=split,
    )


def row(first: int, count: int) -> dict[str, np.ndarray]:
    return {"first": np.array([first]), "count": np.array([count])}


def test_numbers_are_the_steps_of_an_epoch_and_then_its_evaluation() -> None:
    assert [place_of(n, 2, 5) for n in (0, 1, 2, 4, 5, 11)] == [
        Place(0, True, 0),
        Place(0, True, 1),
        Place(0, False, 0),
        Place(0, False, 2),
        Place(1, True, 0),
        Place(2, True, 1),
    ]


def test_a_table_holds_the_batches_of_the_workers_own_threads() -> None:
    batches = batches_of(STREAMS)
    assert batches.num_epoch == 2 + 3 + 1
    table = DataActor(batches)(row(6, 6))
    rows = {s.name: batches.train_split.rows(s) for s in STREAMS}
    shared: dict[str, Any] = {**OPTIONS, "dtype": torch.float32}
    expected = [
        *train_batches(STREAMS, rows, **shared, seed=5, epoch=1, augment=True),
        *eval_batches(STREAMS, rows, **shared),
    ]
    found = dict(packed_batches(table))
    assert list(found) == list(range(6, 12))
    for parts, other in zip(found.values(), expected, strict=True):
        streams = STREAMS if len(parts) == 2 else (STREAMS[list(other.targets) == ["dslr"]],)
        packed = [PackedPart(s, dict(part)) for s, part in zip(streams, parts, strict=True)]
        assert all(part["image"].dtype == np.uint8 for part in parts), "travels as it is stored"
        batch = DataActor(batches)._train.unpack(packed, torch.float32)
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.sample_ids, other.sample_ids)
        for task, values in other.targets.items():
            assert torch.equal(batch.targets[task], values)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("amazon: images/3.jpg is no image"), r"^amazon: images/3\.jpg is no image$"),
        (MemoryError(), r"^a data actor ran out of memory .* batch of 4 samples of each of 2 str"),
    ],
)
def test_what_an_actor_cannot_make_is_told_as_data(error: Exception, message: str) -> None:
    def load(index: int) -> Sample:
        if index == 7:
            raise error
        return STREAMS[0].load(index)

    table = DataActor(batches_of((replace(STREAMS[0], load=load), STREAMS[1])))(row(0, 6))
    with pytest.raises(DataError, match=message):
        list(packed_batches(table))


def test_a_lack_of_memory_is_told_with_the_size_of_a_batch() -> None:
    told = out_of_memory(batches_of(STREAMS).train, 3 * 2**20)
    assert "3.0 MiB; take a smaller batch_size or more workers, fewer data actors" in told
