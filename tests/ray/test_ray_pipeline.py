"""With a real Ray: batches from data actors are those of the worker's own threads, whatever happens
to the actors."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from repmtl_ray import Placement, fit
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import Experiment
from repmtl_ray.data import batches as data_batches
from repmtl_ray.data import ray_pipeline
from repmtl_ray.data.batches import planned_batches, planned_eval_batches
from repmtl_ray.data.cache import CheckedSplit, UncachedSplit, cache_streams
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.data_actor import RunBatches
from repmtl_ray.data.plan import DataError, EvalPlan, TrainPlan
from repmtl_ray.data.ray_pipeline import RayLoader
from repmtl_ray.data.stream import Sample, Stream
from tests.helpers import training
from tests.helpers.layouts import dense_stream, domain_stream

pytestmark = pytest.mark.ray

OFFICE = (domain_stream("amazon", 19), domain_stream("dslr", 3))
DENSE = (dense_stream(40),)


def uncached(streams: tuple[Stream, ...]) -> UncachedSplit:
    """A split whose samples are read again in every epoch."""
    return UncachedSplit(streams=streams, num_bytes=1, fingerprint="", labelled=frozenset())


def batches_of(
    train: CheckedSplit, evaluation: CheckedSplit, workers: Workers = ALONE, **options: Any
) -> RunBatches:
    tasks = tuple(task for stream in train.streams for task in stream.tasks)
    shared: dict[str, Any] = {"tasks": tasks, "workers": workers}
    options = {"batch_size": 4, "seed": 7, "augment": True, **options}
    return RunBatches(
        train=TrainPlan(streams=train.streams, **shared, **options),
        evaluation=EvalPlan(streams=evaluation.streams, batch_size=4, **shared),
        train_split=train,
        eval_split=evaluation,
    )


def run(
    batches: RunBatches, loader: RayLoader | None, *, epochs: int, first_step: int = 0
) -> Iterator[Batch]:
    """All batches of a run in the order of the loop; without a loader, those of local threads."""
    dtype = torch.float32
    train_rows = {s.name: batches.train_split.rows(s) for s in batches.train.selected}
    eval_rows = {s.name: batches.eval_split.rows(s) for s in batches.evaluation.selected}
    for epoch in range(epochs):
        options: dict[str, Any] = {"epoch": epoch, "dtype": dtype, "loader": loader}
        first = first_step if epoch == 0 else 0
        yield from planned_batches(batches.train, train_rows, first_step=first, **options)
        yield from planned_eval_batches(batches.evaluation, eval_rows, **options)


def assert_equal(found: Batch, expected: Batch) -> None:
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.sample_ids, expected.sample_ids)
    assert found.rows == expected.rows
    assert list(found.targets) == list(expected.targets)
    for task, values in expected.targets.items():
        assert torch.equal(found.targets[task], values), task


@pytest.mark.parametrize(
    ("kind", "rank", "num_actors", "first_step"),
    [("office in the object store", 1, 2, 0), ("dense, from storage", 0, 1, 3)],
)
def test_every_batch_of_a_run_is_that_of_the_workers_own_threads(
    monkeypatch: pytest.MonkeyPatch, kind: str, rank: int, num_actors: int, first_step: int
) -> None:
    """From a step inside an epoch on, evaluations included, over several executions."""
    monkeypatch.setattr(ray_pipeline, "MAX_TASK_BATCHES", 3)
    monkeypatch.setattr(ray_pipeline, "MAX_TASKS", 4 if rank else 50)
    if kind.startswith("office"):
        small = tuple(replace(stream, num_samples=3) for stream in OFFICE)
        splits: tuple[CheckedSplit, ...] = (cache_streams(OFFICE), cache_streams(small))
    else:
        splits = (uncached(DENSE), uncached((dense_stream(9),)))
    batches = batches_of(splits[0], splits[1], Workers(rank, 2))
    loader = RayLoader(batches, num_epochs=2, num_actors=num_actors)
    expected = list(run(batches, None, epochs=2, first_step=first_step))
    found = list(run(batches, loader, epochs=2, first_step=first_step))
    loader.close()
    assert len(found) == len(expected) == 2 * batches.num_epoch - first_step
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


@dataclass(frozen=True)
class Spy:
    """Loads samples of a stream, and leaves a file for each, named after the process and the sample.

    Args:
        stream: whose.
        folder: of the files.
        broken: number of a sample that is refused; -1: none.
        seconds: of reading.
    """

    stream: Stream
    folder: Path
    broken: int = -1
    seconds: float = 0.0

    def __call__(self, index: int) -> Sample:
        if index == self.broken:
            raise ValueError(
                f"cityscapes: train/depth/{index}.npy has 3 values that are not finite."
            )
        time.sleep(self.seconds)
        (self.folder / f"{os.getpid()}-{index}-{time.monotonic_ns()}").touch()
        return self.stream.load(index)

    @property
    def readers(self) -> Counter[int]:
        """The processes that read samples, but for this one, and how many."""
        counts = Counter(int(file.name.partition("-")[0]) for file in self.folder.iterdir())
        del counts[os.getpid()]
        return counts


def spied(folder: Path, **options: Any) -> tuple[Spy, RunBatches]:
    spy = Spy(DENSE[0], folder, **options)
    stream = replace(DENSE[0], load=spy)
    return spy, batches_of(uncached((stream,)), uncached((dense_stream(4),)))


@pytest.mark.slow
def test_a_killed_data_actor_changes_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pipeline, "MAX_TASK_BATCHES", 1)
    spy, batches = spied(tmp_path)
    loader = RayLoader(batches, num_epochs=3, num_actors=1)
    expected = list(run(batches_of(uncached(DENSE), batches.eval_split), None, epochs=3))
    for step, (found, other) in enumerate(
        zip(run(batches, loader, epochs=3), expected, strict=True)
    ):
        assert_equal(found, other)
        if step == 5:
            (victim,) = spy.readers
            os.kill(victim, signal.SIGKILL)
    loader.close()
    assert len(spy.readers) > 1, "another actor went on"


@pytest.mark.slow
def test_a_data_actor_that_dies_while_it_has_nothing_to_do_changes_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data does not see such a death, and would wait for ever."""
    monkeypatch.setattr(ray_pipeline, "MAX_TASK_BATCHES", 1)
    monkeypatch.setattr(data_batches, "LOOK_EVERY_S", 0.5)
    spy, batches = spied(tmp_path)
    loader = RayLoader(batches, num_epochs=3, num_actors=1)
    expected = list(run(batches_of(uncached(DENSE), batches.eval_split), None, epochs=3))
    items = run(batches, loader, epochs=3)
    found = [next(items)]
    until_nothing_more_is_read(tmp_path)
    (victim,) = spy.readers
    os.kill(victim, signal.SIGKILL)
    time.sleep(1)  # Ray must have seen the death before the next task would go to the actor
    found += items
    loader.close()
    for batch, other in zip(found, expected, strict=True):
        assert_equal(batch, other)
    assert len(spy.readers) > 1, "another actor went on"


@pytest.mark.slow  # reads for ten seconds
def test_all_data_actors_have_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data fed one actor alone while it had no room for the batches that the worker holds."""
    monkeypatch.setattr(ray_pipeline, "MAX_TASK_BATCHES", 4)
    spy, batches = spied(tmp_path, seconds=0.02)
    loader = RayLoader(batches, num_epochs=8, num_actors=2)
    for _ in run(batches, loader, epochs=8):
        time.sleep(0.02)
    loader.close()
    assert len(spy.readers) == 2
    assert min(spy.readers.values()) > spy.readers.total() / 4, spy.readers


def until_nothing_more_is_read(folder: Path) -> int:
    """Waits; returns how many samples were read."""
    seen, known = -1, 0
    while seen != known:
        seen = known
        time.sleep(1.5)
        known = len(list(folder.iterdir()))
    return known


@pytest.mark.slow  # waits for a worker that is slow
def test_no_more_is_read_than_a_slow_worker_will_need_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pipeline, "MAX_TASK_BATCHES", 1)
    _, batches = spied(tmp_path)
    loader = RayLoader(batches, num_epochs=20, num_actors=1)
    items = run(batches, loader, epochs=20)
    for _ in range(3):
        next(items)
    known = until_nothing_more_is_read(tmp_path)
    items.close()  # type: ignore[attr-defined]
    loader.close()
    ahead = ray_pipeline.AHEAD + ray_pipeline.TAKEN
    assert known // 4 <= 3 + ahead + 2, "batches that were read after three were taken"


@pytest.mark.slow  # waits for a worker that is slow
def test_a_slow_worker_makes_the_object_store_spill_nothing(spilled: Callable[[], bool]) -> None:
    """Samples of 2.3 MB, 740 MB in all, go through a store of 200 MB."""
    stream = replace(DENSE[0], num_samples=160, load=large)
    batches = batches_of(uncached((stream,)), uncached((dense_stream(4),)), augment=False)
    loader = RayLoader(batches, num_epochs=2, num_actors=2)
    num_bytes = 0
    for step, batch in enumerate(run(batches, loader, epochs=2)):
        time.sleep(1.5 if step in (3, 30) else 0)
        num_bytes += sum(v.nbytes for v in batch.targets.values())
    loader.close()
    assert num_bytes > 900e6, "labels are wider in a batch"
    assert not spilled()


def large(index: int) -> Sample:
    """A sample of 2.3 MB."""
    depth = np.full((512, 512, 1), index + 1, dtype=np.float32)
    image, label = np.zeros((512, 512, 3), np.uint8), np.zeros((512, 512), np.int16)
    arrays: Sample = {"image": image, "segmentation": label, "depth": depth}
    return {"sample_id": np.array(index), **arrays}


def test_actors_that_die_of_memory_again_and_again_are_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def execute(_loader: RayLoader, _first: int) -> Iterator[Any]:
        raise ray.exceptions.OutOfMemoryError(
            "Task was killed due to the node running low on memory"
        )

    monkeypatch.setattr(RayLoader, "_execute", execute)
    batches = batches_of(uncached(DENSE), uncached((dense_stream(4),)))
    message = r"^a data actor ran out of memory .* a batch of 4 samples of each of 1 streams, 0\.0 MiB; take a smaller"
    with pytest.raises(DataError, match=message):
        list(run(batches, RayLoader(batches, num_epochs=1, num_actors=1), epochs=1))


def test_a_broken_sample_is_one_error_that_names_its_file(tmp_path: Path) -> None:
    _, batches = spied(tmp_path, broken=11)
    loader = RayLoader(batches, num_epochs=1, num_actors=1)
    with pytest.raises(DataError, match=r"^cityscapes: train/depth/11\.npy has 3 values that are"):
        list(run(batches, loader, epochs=1))
    loader.close()


@pytest.mark.slow
def test_a_run_with_data_actors_has_the_metrics_of_one_without(
    tmp_path: Path, experiment: Experiment
) -> None:
    """Also when two workers have actors at the same time."""
    expected = training.run(experiment).history
    for num_workers in (1, 2):
        placement = Placement(num_workers=num_workers, data="ray", data_cpus=1)
        found = fit(experiment, placement=placement, storage=tmp_path)
        if num_workers == 1:
            assert found.history == expected
        for epoch, other in zip(found.history, expected, strict=True):
            assert epoch == pytest.approx(other, rel=1e-6)


def test_more_data_cpus_than_are_free_are_refused_before_anything_starts(
    tmp_path: Path, experiment: Experiment
) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    placement = Placement(cpus_per_worker=cpus, data="ray")
    with pytest.raises(ValueError, match=r"data is 'ray': 1 workers .* leave 0 .* need 1; take"):
        fit(experiment, placement=placement, storage=tmp_path)


def test_actors_that_find_no_cpu_are_one_error_or_the_workers_own_threads() -> None:
    class Holder:
        def held(self) -> bool:
            return True

    cpus = ray.cluster_resources()["CPU"]
    holder: Any = ray.remote(num_cpus=cpus)(Holder).remote()
    ray.get(holder.held.remote())
    batches = batches_of(uncached(DENSE), uncached((dense_stream(4),)))
    options: dict[str, Any] = {"num_epochs": 1, "num_actors": 1, "timeout_s": 2}
    loader = RayLoader(batches, **options)
    with pytest.raises(
        DataError, match=r"1 data actors did not start within 2 s: .* data='worker'"
    ):
        list(run(batches, loader, epochs=1))
    loader = RayLoader(batches, **options, may_fall_back=True)
    expected = run(batches, None, epochs=1)
    for found, other in zip(run(batches, loader, epochs=1), expected, strict=True):
        assert_equal(found, other)
    assert "the worker's own threads made the batches" in loader.note
    ray.kill(holder)
