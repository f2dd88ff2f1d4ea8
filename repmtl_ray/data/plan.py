"""The plan of a run's batches: what a worker's batch number k holds, whoever makes it.

Owns sharding and the seeds of augmentation; the order of samples is in `sampler`, the layout of a
batch in `collate`. A plan knows no process and no thread: the worker's own threads (`batches`) and
the data actors of a cluster (`ray_pipeline`) call the same functions with the same numbers, so their
batches are equal to the bit.

What the global batch number k is depends on seed, epoch and batch size alone. Workers cut it into
equal slices, so however many they are, together they see the same samples with the same
augmentation.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from repmtl_ray.collectives import Workers
from repmtl_ray.data.collate import Packed, pack, unpack
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID, Batch
from repmtl_ray.data.sampler import Indices, Sampler, samplers_of, steps_per_epoch
from repmtl_ray.data.stream import Kind, Stream
from repmtl_ray.storage import StorageError


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


class DataError(ValueError):
    """A sample that is not as it should be, found while a batch is made; a restart finds it again."""


class Part(NamedTuple):
    """One stream's part of a batch, as stored, and what seeds each row's view."""

    stream: Stream
    samples: dict[str, NDArray[Any]]
    keys: list[tuple[int, ...]]


class PackedPart(NamedTuple):
    """One stream's part of a batch, ready to travel."""

    stream: Stream
    columns: Packed


def packed(stream: Stream, samples: dict[str, NDArray[Any]], tasks: Sequence[str]) -> PackedPart:
    """Samples of a stream, ready to travel.

    Raises:
        DataError: the user's own `collate` does not make inputs of them.
    """
    try:
        return PackedPart(stream, pack(stream, samples, tasks))
    except ValueError as error:
        raise DataError(str(error)) from error


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


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One worker's slices of the global batches of a run.

    The global batch k of an epoch holds, of each stream, the entries k * batch_size to
    (k + 1) * batch_size of its order; a shorter stream goes on with its next lap's order. Worker w
    has the w-th slice of each.

    Args:
        streams: of the training split.
        tasks: whose targets to batch; streams without any of them are left out.
        batch_size: samples of each stream in a global batch.
        seed: with the epoch, decides order and augmentation.
        workers: who share each global batch.
        augment: whether to show random views (`augment.augment`); a sample's view depends on seed,
            epoch, lap, stream and sample_id, not on who reads it.
        pairing: "class" takes the orders of `sampler.align_task_rows` instead.

    Raises:
        ValueError: a batch that does not divide over the workers or is larger than the split, an
            unknown task.
    """

    streams: tuple[Stream, ...]
    tasks: tuple[str, ...]
    batch_size: int
    seed: int
    workers: Workers
    augment: bool
    pairing: Literal["position", "class"] = "position"

    def __post_init__(self) -> None:
        assert self.num_steps >= 1
        assert self.selected
        assert self.num_own >= 1

    @property
    def num_steps(self) -> int:
        """Global batches of an epoch."""
        return steps_per_epoch(self.streams, self.batch_size)

    @property
    def selected(self) -> tuple[Stream, ...]:
        """The streams whose samples are in the batches."""
        return select(self.streams, self.tasks)

    @property
    def num_own(self) -> int:
        """Samples of each stream in this worker's slice."""
        over = self.batch_size % self.workers.size
        if over:
            below = self.batch_size - over
            near = " or ".join(str(size) for size in (below, below + self.workers.size) if size)
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.workers.size} workers cannot share "
                f"equally; take {near}."
            )
        return self.batch_size // self.workers.size


class TrainBatches:
    """Makes the batches of a plan, by epoch and step; keeps the order of the latest epoch.

    Args:
        plan: what they hold.
        rows: the samples, by stream.
    """

    def __init__(self, plan: TrainPlan, rows: Mapping[str, Rows]) -> None:
        self.plan = plan
        self._rows = rows
        self._streams = plan.selected
        self._orders: tuple[int, dict[str, Sampler]] | None = None

    def read(self, epoch: int, step: int) -> list[Part]:
        """This worker's samples of one step, as stored.

        Raises:
            DataError: a sample that is not as it should be.
            StorageError: a storage that does not answer.
        """
        plan, samplers = self.plan, self._samplers(epoch)
        parts = []
        for stream in self._streams:
            first = step * plan.batch_size + plan.workers.rank * plan.num_own
            indices, laps = samplers[stream.name](first, plan.num_own)
            key = zlib.crc32(stream.name.encode())
            samples = _fetch(self._rows, stream, indices, plan.tasks)
            parts.append(Part(stream, samples, [(plan.seed, epoch, int(lap), key) for lap in laps]))
        return parts

    def pack(self, parts: Sequence[Part]) -> list[PackedPart]:
        """The views of samples that were read, ready to travel; changes what it is given.

        Raises:
            DataError: as `packed`.
        """
        tasks = self.plan.tasks
        if self.plan.augment:
            for part in parts:
                _augment_rows(part.samples, _kinds(part.stream, tasks), part.keys)
        return [packed(part.stream, part.samples, tasks) for part in parts]

    def unpack(self, parts: Sequence[PackedPart], dtype: torch.dtype) -> Batch:
        """The batch; `dtype` is that of images, depths and normals."""
        return unpack(parts, self.plan.tasks, dtype)

    def _samplers(self, epoch: int) -> dict[str, Sampler]:
        if self._orders is None or self._orders[0] != epoch:
            plan = self.plan
            samplers = samplers_of(
                plan.streams,
                plan.num_steps * plan.batch_size,
                seed=plan.seed,
                epoch=epoch,
                pairing=plan.pairing,
            )
            self._orders = (epoch, samplers)
        return self._orders[1]


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """One worker's share of a split, in order; all shares together have every sample once.

    A worker goes through the streams one after the other, so the batches of Office have rows of one
    task each. Shares differ by at most one sample a stream, and may be empty.

    Args:
        streams, tasks, workers: as for `TrainPlan`.
        batch_size: rows of a batch of this worker at most; the last of each stream has what is
            left.

    Raises:
        ValueError: an unknown task.
    """

    streams: tuple[Stream, ...]
    tasks: tuple[str, ...]
    batch_size: int
    workers: Workers

    def __post_init__(self) -> None:
        assert self.selected

    @property
    def selected(self) -> tuple[Stream, ...]:
        """The streams whose samples are in the batches."""
        return select(self.streams, self.tasks)


class EvalBatches:
    """Makes the batches of a plan, by number.

    Args:
        plan: what they hold.
        rows: the samples, by stream.
    """

    def __init__(self, plan: EvalPlan, rows: Mapping[str, Rows]) -> None:
        self.plan = plan
        self._rows = rows
        self._slices: list[tuple[Stream, int, int]] = []
        for stream in plan.selected:
            start, end = (
                stream.num_samples * rank // plan.workers.size
                for rank in (plan.workers.rank, plan.workers.rank + 1)
            )
            self._slices += [
                (stream, first, min(first + plan.batch_size, end))
                for first in range(start, end, plan.batch_size)
            ]

    def __len__(self) -> int:
        return len(self._slices)

    def stream_of(self, number: int) -> Stream:
        """The stream of a batch's samples."""
        return self._slices[number][0]

    def pack(self, number: int) -> list[PackedPart]:
        """One batch's samples, ready to travel.

        Raises:
            DataError: a sample that is not as it should be.
            StorageError: a storage that does not answer.
        """
        stream, first, end = self._slices[number]
        tasks = self.plan.tasks
        samples = _fetch(self._rows, stream, np.arange(first, end), tasks)
        return [packed(stream, samples, tasks)]

    def unpack(self, parts: Sequence[PackedPart], dtype: torch.dtype) -> Batch:
        """The batch; `dtype` is that of images, depths and normals."""
        return unpack(parts, self.plan.tasks, dtype)


def _fetch(
    rows: Mapping[str, Rows], stream: Stream, indices: Indices, tasks: Sequence[str]
) -> dict[str, NDArray[Any]]:
    try:
        return rows[stream.name].fetch(indices, _columns(stream, tasks))
    except StorageError:  # the next attempt may read what this one could not
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def _columns(stream: Stream, tasks: Sequence[str]) -> list[str]:
    return [SAMPLE_ID, *stream.inputs, *(task for task in tasks if task in stream.kinds)]


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
