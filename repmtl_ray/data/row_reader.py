"""The reader of a run's streamed rows: it makes the global batches, and each worker's slice of them.

A run has one reader, an actor beside its first worker. It executes the user's Ray Dataset once an
epoch, in order, and draws the rows of each global batch from a window of the rows that come next.
Every worker takes its slice of the batch. So a global batch depends on the rows and their order, the
seed, the epoch and the window, and not on workers, blocks, CPUs or nodes.

Owns the window, the slices, and the checks of a whole pass; no torch. The rows come from `streamed`,
the worker's side is `streamed_loader`.
"""

from __future__ import annotations

import collections
import itertools
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from repmtl_ray.data import validation
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.custom_check import reason_of
from repmtl_ray.data.sampler import Place
from repmtl_ray.data.stream import Sample
from repmtl_ray.data.streamed import RowsRead, StreamedSplit, checksum, rows_in_order, stacked

T = TypeVar("T")

AHEAD = 2
"""Global batches of which a worker has not yet taken its slice, at most."""


def drawn(rows: Iterator[T], window: int, rng: np.random.Generator) -> Iterator[T]:
    """The rows in another order: each is drawn from a window of those that come next.

    Args:
        rows: in their order.
        window: how many rows are held.
        rng: with the order of the rows, decides everything.
    """
    held = list(itertools.islice(rows, window))
    for row in rows:
        place = int(rng.integers(len(held)))
        yield held[place]
        held[place] = row
    for place in rng.permutation(len(held)).tolist():
        yield held[place]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How the rows of a split are read once.

    Args:
        split: the rows.
        tasks: that are trained.
        batch_size: rows of a global batch.
        num_batches: whole ones, of an epoch of training; None: all rows, for an evaluation.
        seed: of the run.
    """

    split: StreamedSplit
    tasks: tuple[str, ...]
    batch_size: int
    num_batches: int | None
    seed: int


class Slice(NamedTuple):
    """A worker's rows of a global batch.

    Attributes:
        samples: stacked by column; at the end of an evaluation none of a batch's rows may be this
            worker's; None after the last batch.
        rows_read: of the split, when the batch was made.
    """

    samples: dict[str, NDArray[Any]] | None
    rows_read: RowsRead


class RowReader:
    """Reads the streamed splits of a run, and hands every worker its slices; an actor.

    Args:
        passes: by whether it is training.
        num_workers: who share each global batch.
        num_cpus: that the tasks of Ray Data may use.
    """

    def __init__(self, passes: Mapping[bool, Pass], num_workers: int, num_cpus: int) -> None:
        self._passes, self._num_workers, self._num_cpus = dict(passes), num_workers, num_cpus
        self._turn = threading.Condition()
        self._now: tuple[int, bool] | None = None
        self._batches: Iterator[tuple[int, list[Sample]]] = iter(())
        self._made: dict[Place, dict[int, Slice]] = {}
        self._known = {is_train: dict(one.split.rows_read) for is_train, one in passes.items()}
        self._num_and_checksum = 0, 0
        self._error = ""

    def slice_of(self, place: Place, rank: int, known: RowsRead) -> Slice | str:
        """A worker's rows of a global batch.

        Args:
            place: of the batch; a worker asks for one after the other.
            rank: of the worker.
            known: of the split, from the checkpoint that the run continues from.

        Returns:
            The rows, or what is wrong with the data.
        """
        with self._turn:
            while rank not in self._made.get(place, {}):
                if self._error:
                    return self._error
                if len(self._made) >= AHEAD:  # a slower worker has not yet taken its slices
                    self._turn.wait()
                    continue
                try:
                    self._make_next(place, known)
                except ray.exceptions.RayTaskError as error:
                    name = self._passes[place.is_train].split.name
                    self._error = f"{name}: its rows cannot be read: {reason_of(error)}"
                except MemoryError:
                    self._error = out_of_memory(self._passes[place.is_train].split)
                except ValueError as error:
                    self._error = str(error)
            slices = self._made[place]
            found = slices.pop(rank)
            if not slices:
                del self._made[place]
            self._turn.notify_all()
        return found

    def _make_next(self, wanted: Place, known_before: RowsRead) -> None:
        """Makes the batch after the last one; a pass begins at the batch that is wanted first."""
        which = wanted[:2]
        if self._now != which:
            self._known[wanted.is_train].update(known_before)
            self._now, self._batches = which, self._read(wanted)
        number, rows = next(self._batches)
        assert number <= wanted.number, "workers ask for one batch after the other"
        pass_ = self._passes[wanted.is_train]
        stream = pass_.split.streams[0]
        columns = [SAMPLE_ID, *stream.inputs, *pass_.tasks]
        known = self._known[wanted.is_train]
        rows_read = {n: known[n] for n in (stream.num_samples,) if n in known}
        rows_read.update([self._num_and_checksum])
        ends = [len(rows) * rank // self._num_workers for rank in range(self._num_workers + 1)]
        self._made[wanted._replace(number=number)] = {
            rank: Slice(
                stacked(rows[start:end], columns) if end > start else {} if rows else None,
                rows_read,
            )
            for rank, (start, end) in enumerate(itertools.pairwise(ends))
        }

    def _read(self, first: Place) -> Iterator[tuple[int, list[Sample]]]:
        """The batches of a pass from one on; an empty one ends an evaluation."""
        pass_ = self._passes[first.is_train]
        rows = read = self._checked_rows(first.is_train)
        if pass_.num_batches is not None:
            key = zlib.crc32(pass_.split.streams[0].name.encode())
            rng = np.random.default_rng([pass_.seed, first.epoch, key])
            rows = drawn(read, pass_.split.window, rng)
        for number in itertools.count():
            batch = list(itertools.islice(rows, pass_.batch_size))
            if number + 1 == pass_.num_batches:
                collections.deque(read, maxlen=0)  # the rest is checked, although no batch has it
            if number >= first.number:
                yield number, batch

    def _checked_rows(self, is_train: bool) -> Iterator[Sample]:
        """All rows of a split in their order.

        Raises:
            ValueError: other rows than before, more or fewer than the user says, or not one label.
        """
        pass_ = self._passes[is_train]
        split = pass_.split
        (stream,) = split.streams
        has_one_form = [IMAGE] if stream.make_inputs else stream.inputs
        forms = {
            n: _form(v) for n, v in split.first[0].items() if n in (*has_one_form, *stream.kinds)
        }
        unlabelled = set(pass_.tasks)
        known, count, read = self._known[is_train], 0, 0
        for row, content in rows_in_order(split.dataset, self._num_cpus):
            where = f"{split.name}: sample {row[SAMPLE_ID]}"
            if count == stream.num_samples:
                raise ValueError(f"{split.name} {_counted('more', stream.num_samples)}")
            for name, form in forms.items():
                if _form(row[name]) != form:
                    raise ValueError(
                        f"{where}: {name} is {_form(row[name])}, in the first row {form}; expected one form."
                    )
            unlabelled -= {t for t in unlabelled if validation.is_labelled(row[t], stream.kinds[t])}
            count, read = count + 1, checksum(read, content)
            if known.get(count, read) != read:
                raise ValueError(f"{split.name}: its first {count} rows came {_CHANGED}")
            self._num_and_checksum = count, read
            yield row
        if count < stream.num_samples:
            raise ValueError(f"{split.name} {_counted(f'{count}', stream.num_samples)}")
        known[count] = read
        if unlabelled:
            raise ValueError(validation.no_label(split.name, min(unlabelled), count))


_CHANGED = (
    "in another order or with other content than before, so the run could be neither repeated nor continued. Take random "
    "numbers and shuffles out of the Dataset (views come from data.augment, shuffling from shuffle_window); after a join or "
    "a groupby, sort by sample_id."
)


def out_of_memory(split: StreamedSplit) -> str:
    """What to tell a user whose reader had not enough memory."""
    num_bytes = split.window * sum(values.nbytes for values in split.first[0].values())
    return (
        f"{split.name}: the process that reads its rows ran out of memory; its window of {split.window} rows takes "
        f"{num_bytes / 2**20:.1f} MiB: take a smaller StreamedRows.shuffle_window or batch_size, or nodes with more memory."
    )


def _counted(found: str, expected: int) -> str:
    return f"has {found} rows, StreamedRows.num_rows says {expected}; dataset.count() counts them."


def _form(values: NDArray[Any]) -> str:
    return f"{values.dtype} {values.shape}"
