from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.data.augment import augment
from repmtl_ray.data.batches import (
    LocalRows,
    eval_batches,
    select,
    train_batches,
)
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.sampler import epoch_order, steps_per_epoch
from repmtl_ray.data.sources import Stream
from tests.helpers.layouts import dense_stream, domain_stream

DENSE = (dense_stream(19),)
OFFICE = (domain_stream("amazon", 19), domain_stream("dslr", 3), domain_stream("webcam", 8))


def train(streams: Any, *, tasks: Any = None, **options: Any) -> list[Batch]:
    options = {
        "tasks": tasks or [task for stream in streams for task in stream.tasks],
        "batch_size": 4,
        "seed": 7,
        "epoch": 0,
        "workers": ALONE,
        "augment": True,
        "dtype": torch.float32,
    } | options
    rows = {stream.name: LocalRows(stream) for stream in streams}
    return list(train_batches(streams, rows, **options))


def evaluate(
    streams: Any, *, workers: Any = ALONE, batch_size: int = 4, tasks: Any = None
) -> list[Batch]:
    rows = {stream.name: LocalRows(stream) for stream in streams}
    tasks = tasks or [task for stream in streams for task in stream.tasks]
    options = {"tasks": tasks, "batch_size": batch_size, "workers": workers}
    return list(eval_batches(streams, rows, **options, dtype=torch.float32))


def by_task(batches: list[Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """The workers' batches of one step, put together in the order of ranks."""
    return {
        task: {
            "images": torch.cat([batch.images[batch.rows[task]] for batch in batches]),
            "targets": torch.cat([batch.targets[task] for batch in batches]),
            "sample_ids": torch.cat([batch.sample_ids[batch.rows[task]] for batch in batches]),
        }
        for task in batches[0].rows
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for task, columns in expected.items():
        for name, values in columns.items():
            assert torch.equal(found[task][name], values), (task, name)


@pytest.mark.parametrize("streams", [DENSE, OFFICE], ids=["dense", "office"])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 3])
def test_global_batches_do_not_depend_on_the_number_of_workers(
    streams: tuple[Any, ...], num_workers: int, epoch: int
) -> None:
    alone = train(streams, epoch=epoch)
    shares = [
        train(streams, epoch=epoch, workers=Workers(rank, num_workers))
        for rank in range(num_workers)
    ]
    assert {len(share) for share in shares} == {len(alone)} == {4}
    for step, expected in enumerate(alone):
        assert_same(by_task([share[step] for share in shares]), by_task([expected]))


@pytest.mark.parametrize("num_samples", [1, 2, 10, 1000])
def test_an_order_is_a_permutation(num_samples: int) -> None:
    order = epoch_order(num_samples, seed=0, epoch=2, lap=1, stream="dslr")
    assert sorted(order.tolist()) == list(range(num_samples))


def test_an_order_depends_on_each_of_its_arguments() -> None:
    base = {"seed": 1, "epoch": 0, "lap": 0, "stream": "amazon"}
    others = [
        base | change for change in ({"seed": 2}, {"epoch": 1}, {"lap": 1}, {"stream": "dslr"})
    ]
    orders = [epoch_order(50, **arguments).tolist() for arguments in (base, base, *others)]
    assert orders[0] == orders[1]
    for one, other in itertools.combinations(orders[1:], 2):
        assert one != other


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 19])
def test_entries_against_a_slow_reference(batch_size: int) -> None:
    batches = train(OFFICE, batch_size=batch_size, epoch=5)
    assert len(batches) == 19 // batch_size
    for stream in OFFICE:
        entries: list[int] = []
        for lap in itertools.count():
            order = epoch_order(stream.num_samples, seed=7, epoch=5, lap=lap, stream=stream.name)
            entries += order.tolist()
            if len(entries) >= 19:
                break
        found = [batch.sample_ids[batch.rows[stream.name]].tolist() for batch in batches]
        assert found == [
            entries[step * batch_size : (step + 1) * batch_size] for step in range(len(batches))
        ]


def test_an_epoch_shows_every_sample_at_most_once_and_epochs_differ() -> None:
    epochs = [
        [int(i) for batch in train(DENSE, epoch=epoch) for i in batch.sample_ids]
        for epoch in (0, 1)
    ]
    for ids in epochs:
        assert len(ids) == len(set(ids)) == 16
    assert epochs[0] != epochs[1]


def test_batches_keep_the_contract() -> None:
    first = train(DENSE, augment=False, batch_size=2, dtype=torch.float64)[0]
    assert first.images.shape == (2, 3, 6, 10)
    assert first.images.dtype == first.targets["depth"].dtype == torch.float64
    assert first.targets["segmentation"].shape == (2, 6, 10)
    assert first.targets["segmentation"].dtype == first.sample_ids.dtype == torch.int64
    assert first.targets["depth"].shape == (2, 1, 6, 10)
    assert first.rows == {"segmentation": slice(0, 2), "depth": slice(0, 2)}
    assert first.images.is_contiguous()
    for row, index in enumerate(first.sample_ids.tolist()):
        sample = DENSE[0].load(index)
        image = first.images[row].permute(1, 2, 0).float().numpy()
        np.testing.assert_array_equal(image, sample["image"])
        np.testing.assert_array_equal(first.targets["segmentation"][row], sample["segmentation"])
        np.testing.assert_array_equal(first.targets["depth"][row, 0], sample["depth"][:, :, 0])


def test_bytes_are_scaled_and_normalised() -> None:
    first = train(OFFICE, augment=False, batch_size=2, dtype=torch.float64)[0]
    assert first.rows == {"amazon": slice(0, 2), "dslr": slice(2, 4), "webcam": slice(4, 6)}
    assert first.targets["dslr"].dtype == torch.int64
    assert first.targets["dslr"].shape == (2,)
    for stream in OFFICE:
        rows = first.rows[stream.name]
        for index, image in zip(first.sample_ids[rows], first.images[rows], strict=True):
            stored = stream.load(int(index))["image"]
            expected = (stored / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)
            np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=1e-12, atol=1e-14)


def test_augmentation_is_seeded_by_epoch_lap_stream_and_sample() -> None:
    stream = OFFICE[1]  # 3 samples: every batch of 19 has each sample in several laps
    batch = train(OFFICE, batch_size=19, epoch=4, dtype=torch.float64)[0]
    rows = batch.rows["dslr"]
    for entry, (index, image) in enumerate(
        zip(batch.sample_ids[rows].tolist(), batch.images[rows], strict=True)
    ):
        rng = np.random.default_rng([7, 4, entry // 3, crc32(b"dslr"), index])
        view = augment(stream.load(index), rng=rng, kinds={"image": "image"})["image"]
        expected = (view / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)
        np.testing.assert_allclose(image, expected.transpose(2, 0, 1), rtol=1e-12, atol=1e-14)
    assert len({image.numpy().tobytes() for image in batch.images[rows]}) > 6


@pytest.mark.parametrize("streams", [DENSE, OFFICE], ids=["dense", "office"])
def test_one_task_alone_sees_what_it_sees_among_others(streams: tuple[Any, ...]) -> None:
    together = train(streams)
    for task in together[0].rows:
        alone = train(streams, tasks=[task], batch_size=4 if streams is DENSE else 2)
        assert list(alone[0].rows) == list(alone[0].targets) == [task]
        if streams is DENSE:
            for one, all_ in zip(alone, together, strict=True):
                assert_same(by_task([one]), {task: by_task([all_])[task]})
    (first, *_) = train(OFFICE, tasks=["webcam"], batch_size=8)
    assert len(first.images) == 8  # no rows of other domains


@pytest.mark.parametrize("streams", [DENSE, OFFICE], ids=["dense", "office"])
@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_an_epoch_can_begin_late(streams: tuple[Any, ...], first_step: int) -> None:
    late, whole = train(streams, first_step=first_step), train(streams)
    assert len(late) == 4 - first_step
    for one, other in zip(late, whole[first_step:], strict=True):
        assert_same(by_task([one]), by_task([other]))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_evaluation_covers_every_sample_once_and_in_order(
    num_workers: int, batch_size: int
) -> None:
    shares = [
        evaluate(OFFICE, workers=Workers(rank, num_workers), batch_size=batch_size)
        for rank in range(num_workers)
    ]
    for stream in OFFICE:
        ids = [
            int(index)
            for share in shares
            for batch in share
            if stream.name in batch.rows
            for index in batch.sample_ids[batch.rows[stream.name]]
        ]
        assert ids == list(range(stream.num_samples))
    batches = [batch for share in shares for batch in share]
    assert all(0 < len(batch.images) <= batch_size for batch in batches)
    assert all(list(batch.rows) == list(batch.targets) for batch in batches)
    sizes = [sum(len(batch.images) for batch in share) for share in shares]
    assert max(sizes) - min(sizes) <= len(OFFICE)


def test_evaluation_shows_samples_as_they_are_and_a_worker_may_have_none() -> None:
    (batch,) = evaluate(DENSE, batch_size=19, tasks=["depth"])
    assert list(batch.targets) == ["depth"]
    np.testing.assert_array_equal(
        batch.images[3].permute(1, 2, 0).numpy(), DENSE[0].load(3)["image"]
    )
    assert evaluate((dense_stream(2),), workers=Workers(0, 3)) == []


def test_steps_follow_the_longest_stream() -> None:
    assert steps_per_epoch(OFFICE, 4) == 4
    assert steps_per_epoch(OFFICE[1:], 4) == 2
    assert [stream.name for stream in select(OFFICE, ["webcam", "amazon"])] == ["amazon", "webcam"]


def test_a_task_alone_takes_as_many_steps_as_together() -> None:
    options = {"batch_size": 4, "seed": 0, "epoch": 0, "augment": False, "workers": ALONE}
    rows = {stream.name: LocalRows(stream) for stream in OFFICE}
    for tasks in (["amazon", "dslr", "webcam"], ["dslr"]):
        found = train_batches(OFFICE, rows, tasks=tasks, dtype=torch.float32, **options)
        assert len(list(found)) == 4


def test_what_cannot_work_is_refused_at_once() -> None:
    def start(streams: Any = OFFICE, **options: Any) -> None:
        options = {"tasks": ["amazon"], "batch_size": 4, "workers": ALONE} | options
        train_batches(streams, {}, seed=0, epoch=0, augment=False, dtype=torch.float32, **options)

    with pytest.raises(
        ValueError, match="batch_size is 6, which 4 workers cannot share equally; take 4 or 8"
    ):
        start(workers=Workers(1, 4), batch_size=6)
    with pytest.raises(ValueError, match=r"batch_size is 2, which 4 workers .*; take 4"):
        start(workers=Workers(1, 4), batch_size=2)
    with pytest.raises(
        ValueError,
        match=r"batch_size is 20, but the longest stream, amazon, has 19 samples, .* at most 19",
    ):
        start(tasks=["amazon", "dslr"], batch_size=20)
    with pytest.raises(ValueError, match="but the training split has 8 samples"):
        start(OFFICE[2:], tasks=["webcam"], batch_size=9)
    with pytest.raises(ValueError, match="no stream has 'amzon'; there are amazon, dslr, webcam"):
        start(tasks=["amzon"])
    with pytest.raises(ValueError, match="no stream has 'depht'; there are segmentation, depth"):
        evaluate(DENSE, tasks=["depht"])


@dataclass
class _Recording:
    """Loads like another stream, counts, and breaks at one sample."""

    stream: Stream
    loaded: list[int]
    breaks_at: int | None = None

    def __call__(self, index: int) -> Any:
        if index == self.breaks_at:
            raise ValueError(f"sample {index} is broken")
        self.loaded.append(index)
        return self.stream.load(index)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


def test_errors_of_the_thread_reach_the_consumer() -> None:
    order = epoch_order(19, seed=7, epoch=0, lap=0, stream="cityscapes").tolist()
    stream = replace(DENSE[0], load=_Recording(DENSE[0], [], breaks_at=order[9]))
    batches = train_batches(
        (stream,),
        {"cityscapes": LocalRows(stream)},
        tasks=["depth"],
        batch_size=4,
        seed=7,
        epoch=0,
        workers=ALONE,
        augment=False,
        dtype=torch.float32,
    )
    assert [next(batches).sample_ids.tolist() for _ in range(2)] == [order[:4], order[4:8]]
    with pytest.raises(ValueError, match=f"sample {order[9]} is broken"):
        next(batches)
    assert _threads() == []


@pytest.mark.parametrize("end", ["close", "forget", "exhaust", "never start"])
def test_the_thread_ends_with_its_iterator(end: str) -> None:
    recording = _Recording(DENSE[0], [])
    stream = replace(DENSE[0], load=recording)
    batches = eval_batches(
        (stream,),
        {"cityscapes": LocalRows(stream)},
        tasks=["depth"],
        batch_size=1,
        workers=ALONE,
        dtype=torch.float32,
        prefetch=2,
    )
    assert _threads() == []
    if end == "never start":
        assert recording.loaded == []
        return
    next(batches)
    deadline = time.monotonic() + 10
    while len(recording.loaded) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    # One was handed over, two wait, one is made and waits for room.
    assert recording.loaded == [0, 1, 2, 3]
    assert _threads() == ["batches"]
    if end == "close":
        assert isinstance(batches, Generator)
        batches.close()
    elif end == "exhaust":
        assert len(list(batches)) == 18
    else:
        del batches
        gc.collect()
    assert _threads() == []


def test_local_rows_load_each_sample_once() -> None:
    recording = _Recording(DENSE[0], [])
    rows = LocalRows(replace(DENSE[0], load=recording))
    assert len(rows) == 19
    first = rows.fetch(np.array([3, 1, 3]))
    first["image"][:] = 0
    again = rows.fetch(np.array([1, 3]), ["image"])
    assert recording.loaded == [3, 1]
    assert set(first) == {"sample_id", "image", "segmentation", "depth"}
    assert set(again) == {"image"}
    np.testing.assert_array_equal(again["image"][1], DENSE[0].load(3)["image"])
