"""The loader: each worker's batches, made by its own threads or by a cluster's data actors.

Owns the two generators that a run takes its batches from, and the prefetching thread. What is in a
batch is in `plan`; samples come from a `Rows`: from the object store (`cache`), from storage
(`storage_rows`), or straight from files (`LocalRows`). Knows nothing of Ray: who makes batches
elsewhere hands over a `Loader` (`ray_pipeline`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from repmtl_ray.collectives import Workers
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.plan import EvalBatches, EvalPlan, Part, Rows, TrainBatches, TrainPlan, select
from repmtl_ray.data.sampler import Indices
from repmtl_ray.data.stream import Sample, Stream

__all__ = [
    "Loader",
    "LocalRows",
    "Rows",
    "eval_batches",
    "planned_batches",
    "planned_eval_batches",
    "prefetched",
    "select",
    "train_batches",
]

T = TypeVar("T")
LOOK_EVERY_S = 5.0
"""Between two looks at what makes the batches, while none comes."""


class Loader(Protocol):
    """Makes the batches of a run in other processes, equal to the bit to those made here."""

    rows_read: dict[str, dict[int, int]]
    """By split, the checksum of its first rows, by their number; a run that continues compares
    them. Empty where a sample is found by its number."""

    def train(
        self, plan: TrainPlan, *, epoch: int, first_step: int, dtype: torch.dtype
    ) -> Iterator[Batch]:
        """The rest of an epoch, from a step on."""

    def evaluate(self, plan: EvalPlan, *, epoch: int, dtype: torch.dtype) -> Iterator[Batch]:
        """The evaluation after an epoch."""


class LocalRows:
    """Reads samples when they are first asked for, in this process, and keeps them.

    Args:
        stream: where they come from.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self._stream.num_samples

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        samples = [self._sample(int(index)) for index in indices]
        names = columns if columns is not None else list(samples[0])
        return {name: np.stack([sample[name] for sample in samples]) for name in names}

    def _sample(self, index: int) -> Sample:
        if index not in self._samples:
            self._samples[index] = self._stream.load(index)
        return self._samples[index]


def train_batches(
    streams: Sequence[Stream],
    rows: Mapping[str, Rows],
    *,
    tasks: Sequence[str],
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    workers: Workers,
    augment: bool,
    dtype: torch.dtype,
    pairing: Literal["position", "class"] = "position",
    prefetch: int = 2,
) -> Iterator[Batch]:
    """One worker's slices of an epoch's global batches.

    Args:
        streams, tasks, batch_size, seed, workers, augment, pairing: as for `TrainPlan`.
        rows: the samples, by stream.
        epoch: from 0.
        first_step: begin with this global batch.
        dtype: of images, depths and normals.
        prefetch: batches made ahead of use, at least 1, by one background thread; it ends with the
            iterator, and its errors come out of it.

    Raises:
        ValueError: at once: a batch that does not divide over the workers or is larger than the
            split, an unknown task; later: what `rows` raises.
    """
    plan = TrainPlan(
        streams=tuple(streams),
        tasks=tuple(tasks),
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        augment=augment,
        pairing=pairing,
    )
    return planned_batches(
        plan, rows, epoch=epoch, first_step=first_step, dtype=dtype, prefetch=prefetch
    )


def planned_batches(
    plan: TrainPlan,
    rows: Mapping[str, Rows],
    *,
    epoch: int,
    first_step: int = 0,
    dtype: torch.dtype,
    prefetch: int = 2,
    loader: Loader | None = None,
) -> Iterator[Batch]:
    """The rest of an epoch of a plan.

    Args:
        plan: what the batches hold.
        rows, epoch, first_step, dtype, prefetch: as for `train_batches`.
        loader: who makes the batches; None: threads of this process.

    Raises:
        ValueError: later: what `rows` raises.
    """
    if loader is not None:
        return loader.train(plan, epoch=epoch, first_step=first_step, dtype=dtype)
    batches = TrainBatches(plan, rows)

    def read() -> Iterator[list[Part]]:
        for step in range(first_step, plan.num_steps):
            yield batches.read(epoch, step)

    def make() -> Iterator[Batch]:
        # Two threads, so that samples are read while those before them are augmented.
        with closing(prefetched(read, prefetch)) as steps:
            for parts in steps:
                yield batches.unpack(batches.pack(parts), dtype)

    return prefetched(make, prefetch)


def eval_batches(
    streams: Sequence[Stream],
    rows: Mapping[str, Rows],
    *,
    tasks: Sequence[str],
    batch_size: int,
    workers: Workers,
    dtype: torch.dtype,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """One worker's share of a split, in order; all shares together have every sample once.

    Args:
        streams, tasks, batch_size, workers: as for `EvalPlan`.
        rows, dtype, prefetch: as for `train_batches`.

    Raises:
        ValueError: an unknown task at once; later: what `rows` raises.
    """
    plan = EvalPlan(
        streams=tuple(streams), tasks=tuple(tasks), batch_size=batch_size, workers=workers
    )
    return planned_eval_batches(plan, rows, dtype=dtype, prefetch=prefetch)


def planned_eval_batches(
    plan: EvalPlan,
    rows: Mapping[str, Rows],
    *,
    epoch: int = 0,
    dtype: torch.dtype,
    prefetch: int = 2,
    loader: Loader | None = None,
) -> Iterator[Batch]:
    """The batches of an evaluation's plan.

    Args:
        plan: what the batches hold.
        rows, dtype, prefetch, loader: as for `planned_batches`.
        epoch: after which the split is read, from 0; the batches do not depend on it.

    Raises:
        ValueError: later: what `rows` raises.
    """
    if loader is not None:
        return loader.evaluate(plan, epoch=epoch, dtype=dtype)
    batches = EvalBatches(plan, rows)

    def make() -> Iterator[Batch]:
        for number in range(len(batches)):
            yield batches.unpack(batches.pack(number), dtype)

    return prefetched(make, prefetch)


def prefetched(
    make: Callable[[], Iterator[T]],
    depth: int,
    *,
    while_waiting: Callable[[], None] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> Generator[T, None, None]:
    """Runs an iterator in a thread, at most `depth` items ahead of its consumer.

    Args:
        make: the iterator.
        depth: items that may wait for the consumer.
        while_waiting: called every `LOOK_EVERY_S` in which no item came.
        interrupt: called when the consumer stops, so that the thread ends which waits for an item.
    """
    assert depth >= 1, "a queue of size 0 would be unbounded"
    items: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def hand_over(item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.05)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in make():
                hand_over(batch)
                if stop.is_set():
                    return
            hand_over(None)
        except BaseException as error:  # noqa: BLE001 -- raised again in the consumer's thread
            hand_over(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = items.get(timeout=None if while_waiting is None else LOOK_EVERY_S)
            except queue.Empty:
                assert while_waiting is not None
                while_waiting()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if interrupt is not None and thread.is_alive():
            interrupt()
        thread.join()
