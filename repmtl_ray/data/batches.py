"""The loader: from the samples of streams to each worker's part of every global batch.

Owns sharding, augmentation seeds and the prefetching thread; the order of samples is in `sampler`,
the layout of a batch in `collate`. Knows nothing of Ray: a `Rows` hands out samples, from the object
store (`cache`) or straight from files (`LocalRows`).

What the global batch number k is depends on seed, epoch and batch size alone. Workers cut it into
equal slices, so however many they are, together they see the same samples with the same
augmentation.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from repmtl_ray.collectives import Workers
from repmtl_ray.data.collate import collate
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID, Batch
from repmtl_ray.data.sampler import Indices, samplers_of, steps_per_epoch
from repmtl_ray.data.stream import Kind, Sample, Stream

T = TypeVar("T")


class _Part(NamedTuple):
    """One stream's part of a batch, as stored, and what seeds each row's view."""

    stream: Stream
    samples: dict[str, NDArray[Any]]
    keys: list[tuple[int, ...]]


class Rows(Protocol):
    """The samples of one stream, by number."""

    def __len__(self) -> int: ...

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Samples, stacked along a new first axis.

        Args:
            indices: [rows], from 0 to len - 1, repeats allowed.
            columns: which; None means all.

        Returns:
            By column; arrays that the caller may write to.
        """


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


def select(streams: Sequence[Stream], tasks: Sequence[str]) -> tuple[Stream, ...]:
    """The streams that have a target for at least one of the tasks.

    Raises:
        ValueError: a task that no stream has.
    """
    known = [task for stream in streams for task in stream.tasks]
    for task in tasks:
        if task not in known:
            raise ValueError(f"tasks: no stream has {task!r}; there are {', '.join(known)}.")
    return tuple(stream for stream in streams if any(task in stream.kinds for task in tasks))


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

    The global batch k holds, of each stream, the entries k * batch_size to (k + 1) * batch_size of
    its order; a shorter stream goes on with its next lap's order. Worker w has the w-th slice of
    each.

    Args:
        streams: of the training split.
        rows: their samples, by stream.
        tasks: whose targets to batch; streams without any of them are left out.
        batch_size: samples of each stream in a global batch.
        seed, epoch: decide order and augmentation.
        first_step: begin with this global batch.
        workers: who share each global batch.
        augment: whether to show random views (`augment.augment`); a sample's view depends on seed,
            epoch, lap, stream and sample_id, not on who reads it.
        dtype: of images, depths and normals.
        pairing: "class" takes the orders of `sampler.align_task_rows` instead.
        prefetch: batches made ahead of use, at least 1, by one background thread; it ends with the
            iterator, and its errors come out of it.

    Raises:
        ValueError: at once: a batch that does not divide over the workers or is larger than the
            split, an unknown task; later: what `rows` raises.
    """
    num_steps = steps_per_epoch(streams, batch_size)
    samplers = samplers_of(streams, num_steps * batch_size, seed=seed, epoch=epoch, pairing=pairing)
    streams = select(streams, tasks)
    num_own = _share(batch_size, workers)

    def part(stream: Stream, step: int) -> _Part:
        """This worker's samples of one stream in one step."""
        indices, laps = samplers[stream.name](step * batch_size + workers.rank * num_own, num_own)
        key = zlib.crc32(stream.name.encode())
        return _Part(
            stream,
            rows[stream.name].fetch(indices, _columns(stream, tasks)),
            [(seed, epoch, int(lap), key) for lap in laps],
        )

    def read() -> Iterator[list[_Part]]:
        for step in range(first_step, num_steps):
            yield [part(stream, step) for stream in streams]

    def make() -> Iterator[Batch]:
        # Two threads, so that samples are read while those before them are augmented.
        with closing(prefetched(read, prefetch)) as steps:
            for parts in steps:
                if augment:
                    for entry in parts:
                        _augment_rows(entry.samples, _kinds(entry.stream, tasks), entry.keys)
                yield collate([(entry.stream, entry.samples) for entry in parts], tasks, dtype)

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

    A worker goes through the streams one after the other, so the batches of Office have rows of one
    task each. Shares differ by at most one sample a stream, and may be empty.

    Args:
        streams, rows, tasks, workers, dtype, prefetch: as for `train_batches`.
        batch_size: rows of a batch of this worker at most; the last of each stream has what is
            left.

    Raises:
        ValueError: an unknown task at once; later: what `rows` raises.
    """
    streams = select(streams, tasks)

    def make() -> Iterator[Batch]:
        for stream in streams:
            start, end = (
                stream.num_samples * rank // workers.size
                for rank in (workers.rank, workers.rank + 1)
            )
            for first in range(start, end, batch_size):
                indices = np.arange(first, min(first + batch_size, end))
                samples = rows[stream.name].fetch(indices, _columns(stream, tasks))
                yield collate([(stream, samples)], tasks, dtype)

    return prefetched(make, prefetch)


def _share(batch_size: int, workers: Workers) -> int:
    over = batch_size % workers.size
    if over:
        below = batch_size - over
        near = " or ".join(str(size) for size in (below, below + workers.size) if size)
        raise ValueError(
            f"batch_size is {batch_size}, which {workers.size} workers cannot share equally; take "
            f"{near}."
        )
    return batch_size // workers.size


def _columns(stream: Stream, tasks: Sequence[str]) -> list[str]:
    return [SAMPLE_ID, IMAGE, *(task for task in tasks if task in stream.kinds)]


def _kinds(stream: Stream, tasks: Sequence[str]) -> dict[str, Kind]:
    return {IMAGE: "image", **{task: stream.kinds[task] for task in tasks if task in stream.kinds}}


def _augment_rows(
    samples: dict[str, NDArray[Any]], kinds: Mapping[str, Kind], keys: Sequence[tuple[int, ...]]
) -> None:
    """Replaces every sample by a view of it; a key and the sample_id are the seed of each."""
    from repmtl_ray.data.augment import augment as augmented  # a second of every process's start

    for row, key in enumerate(keys):
        # A seed's parts are not negative: an id below 0 counts from 2**64 down.
        rng = np.random.default_rng([*key, int(samples[SAMPLE_ID][row]) % 2**64])
        view = augmented({name: samples[name][row] for name in kinds}, rng=rng, kinds=kinds)
        for name in kinds:
            samples[name][row] = view[name]


def prefetched(make: Callable[[], Iterator[T]], depth: int) -> Generator[T, None, None]:
    """Runs an iterator in a thread, at most `depth` items ahead of its consumer."""
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
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
