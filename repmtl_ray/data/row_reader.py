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
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from repmtl_ray.data import validation
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.custom_check import reason_of
from repmtl_ray.data.sampler import Place
from repmtl_ray.data.stream import Sample
from repmtl_ray.data.streamed import StreamedSplit, content_of, rows_in_order, stacked

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
        self._made: dict[Place, dict[int, dict[str, NDArray[Any]] | None]] = {}
        self._orders: dict[bool, int] = {}
        self._error = ""

    def slice_of(self, place: Place, rank: int) -> dict[str, NDArray[Any]] | str | None:
        """A worker's rows of a global batch, stacked by column.

        Args:
            place: of the batch; a worker asks for one after the other.
            rank: of the worker.

        Returns:
            The rows, none of which may be this worker's at the end of an evaluation; None after it;
            or what is wrong with the data.
        """
        with self._turn:
            while rank not in self._made.get(place, {}):
                if self._error:
                    return self._error
                if len(self._made) >= AHEAD:  # a slower worker has not yet taken its slices
                    self._turn.wait()
                    continue
                try:
                    self._make_next(place)
                except ray.exceptions.RayTaskError as error:
                    name = self._passes[place.is_train].split.name
                    self._error = f"{name}: its rows cannot be read: {reason_of(error)}"
                except ValueError as error:
                    self._error = str(error)
            slices = self._made[place]
            found = slices.pop(rank)
            if not slices:
                del self._made[place]
            self._turn.notify_all()
        return found

    def _make_next(self, wanted: Place) -> None:
        """Makes the batch after the last one; a pass begins at the batch that is wanted first."""
        which = wanted[:2]
        if self._now != which:
            self._now, self._batches = which, self._read(wanted)
        number, rows = next(self._batches)
        assert number <= wanted.number, "workers ask for one batch after the other"
        pass_ = self._passes[wanted.is_train]
        stream = pass_.split.streams[0]
        columns = [SAMPLE_ID, *stream.inputs, *pass_.tasks]
        ends = [len(rows) * rank // self._num_workers for rank in range(self._num_workers + 1)]
        self._made[wanted._replace(number=number)] = {
            rank: stacked(rows[start:end], columns) if end > start else {} if rows else None
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
        count = order = 0
        for row in rows_in_order(split.dataset, self._num_cpus):
            where = f"{split.name}: sample {row[SAMPLE_ID]}"
            if count < len(split.first):
                _check_same(split, row, count)
            if count == stream.num_samples:
                raise ValueError(f"{split.name} {_counted('more', stream.num_samples)}")
            for name, form in forms.items():
                if _form(row[name]) != form:
                    raise ValueError(
                        f"{where}: {name} is {_form(row[name])}, in the first row {form}; expected one form."
                    )
            unlabelled -= {t for t in unlabelled if validation.is_labelled(row[t], stream.kinds[t])}
            count, order = count + 1, zlib.crc32(row[SAMPLE_ID].tobytes(), order)
            yield row
        if count < stream.num_samples:
            raise ValueError(f"{split.name} {_counted(f'{count}', stream.num_samples)}")
        if self._orders.setdefault(is_train, order) != order:
            raise ValueError(f"{split.name}: its rows came {_CHANGED}")
        if unlabelled:
            raise ValueError(validation.no_label(split.name, min(unlabelled), count))


_CHANGED = (
    "in another order or with other content than before, so the run could be neither repeated nor continued. Take random "
    "numbers and shuffles out of the Dataset (views come from data.augment, shuffling from shuffle_window); after a join or "
    "a groupby, sort by sample_id."
)


def _counted(found: str, expected: int) -> str:
    return f"has {found} rows, StreamedRows.num_rows says {expected}; dataset.count() counts them."


def _form(values: NDArray[Any]) -> str:
    return f"{values.dtype} {values.shape}"


def _check_same(split: StreamedSplit, row: Sample, place: int) -> None:
    """Whether a pass begins with the rows that were there before training.

    Raises:
        ValueError: it does not.
    """
    if content_of(row) != content_of(split.first[place]):
        raise ValueError(f"{split.name}: sample {row[SAMPLE_ID]}, row {place}, came {_CHANGED}")
