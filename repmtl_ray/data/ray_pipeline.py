"""A worker's batches from a pipeline of Ray Data, whose actors read and augment on any node.

One row of the dataset is a few numbers of the run's plan: (first, count) stands for so many batches
of this worker, training steps and the evaluation after each epoch in one sequence. An actor pool
turns a row into packed batches by the functions that the worker's own threads call too (`plan`), so
the batches are equal to the bit. Ray Data keeps the rows in order and limits how many are made ahead. If
an actor or its node dies, a new execution starts at the batch that the worker needs next.

Every worker executes a dataset of its own, from the step of its checkpoint to the end of the run. The
alternative, `streaming_split` of one dataset for all workers, hands blocks to whoever asks first, so a
row could not be meant for one worker; it also ends with any worker, where here the others go on. One
execution lasts for all epochs, because a new one costs the start of its actors.

Owns the way of batches between processes. Whether a run uses it is decided in `placement.Placement`.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources

from repmtl_ray.data.batches import planned_batches, planned_eval_batches, prefetched
from repmtl_ray.data.cache import CheckedSplit, quiet
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.plan import (
    DataError,
    EvalBatches,
    EvalPlan,
    PackedPart,
    TrainBatches,
    TrainPlan,
)
from repmtl_ray.data.stream import Stream

logger = logging.getLogger(__name__)

TASK_BYTES = 24 * 2**20
"""Of the batches that one task makes, about; a task costs milliseconds whatever it makes."""
TASK_S = 0.5
"""Of the reading that one task does, about: the first batch waits for its whole task."""
MAX_TASK_BATCHES = 8
MAX_TASKS = 2_000
"""Of one execution. Ray Data stores every row before the first one is read, a millisecond for each;
a longer run takes one execution after the other."""
AHEAD = 2
"""Tasks of each actor whose batches may wait for the worker or be in the making."""
MAX_FAILURES = 3
"""Executions in succession that may fail without one batch from any of them."""
_ERROR = "error"
_SCHEMA = pyarrow.schema(
    [
        ("number", pyarrow.int64()),
        ("part", pyarrow.int64()),
        ("column", pyarrow.string()),
        ("dtype", pyarrow.string()),
        ("shape", pyarrow.list_(pyarrow.int64())),
        ("data", pyarrow.large_binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class RunBatches:
    """All batches of a run for one worker, numbered: each epoch's steps, then its evaluation.

    Args:
        train, evaluation: the plans.
        train_split, eval_split: their samples.
    """

    train: TrainPlan
    evaluation: EvalPlan
    train_split: CheckedSplit
    eval_split: CheckedSplit

    @property
    def num_evaluation(self) -> int:
        """Batches of an evaluation."""
        return len(EvalBatches(self.evaluation, {}))

    @property
    def num_epoch(self) -> int:
        """Batches of an epoch and its evaluation."""
        return self.train.num_steps + self.num_evaluation

    def cost(self) -> Cost:
        """What a training batch of this worker takes, about: as if every sample were the first."""
        begin = time.perf_counter()
        first = [
            values
            for stream in self.train.selected
            for values in self.train_split.rows(stream).fetch(np.array([0])).values()
        ]
        seconds = time.perf_counter() - begin
        num_own = self.train.num_own
        return Cost(num_own * sum(values.nbytes for values in first), num_own * seconds)


class Cost(NamedTuple):
    """What a batch takes.

    Attributes:
        num_bytes: of the packed batch.
        seconds: of one process, to read its samples.
    """

    num_bytes: int
    seconds: float


class Place(NamedTuple):
    """Where in a run a batch is: its step in the epoch or, if it is of the evaluation, its number."""

    epoch: int
    is_train: bool
    number: int


def place_of(number: int, num_steps: int, num_epoch: int) -> Place:
    """The place of a batch in a run.

    Args:
        number: of the batch, from 0, all epochs counted.
        num_steps: training steps of an epoch.
        num_epoch: batches of an epoch and its evaluation.
    """
    epoch, within = divmod(number, num_epoch)
    is_train = within < num_steps
    return Place(epoch, is_train, within if is_train else within - num_steps)


class DataActor:
    """Makes the batches of a run by number; one process of the pool.

    Args:
        batches: of the run.
    """

    def __init__(self, batches: RunBatches) -> None:
        torch.set_num_threads(1)
        train, evaluation = batches.train, batches.evaluation
        splits = batches.train_split, batches.eval_split
        self._train = TrainBatches(train, {s.name: splits[0].rows(s) for s in train.selected})
        self._eval = EvalBatches(
            evaluation, {s.name: splits[1].rows(s) for s in evaluation.selected}
        )
        self._num_epoch = batches.num_epoch
        self._memory = out_of_memory(train, batches.cost().num_bytes)

    def __call__(self, row: dict[str, NDArray[np.int64]]) -> pyarrow.Table:
        first, count = int(row["first"][0]), int(row["count"][0])
        tables = []
        for number in range(first, first + count):
            try:
                tables.append(_packed_table(number, self._make(number)))
            except DataError as error:  # as data: an exception of Ray's would hide its message
                tables.append(_error_table(number, str(error)))
                break
            except MemoryError:
                tables.append(_error_table(number, self._memory))
                break
        return pyarrow.concat_tables(tables)

    def _make(self, number: int) -> list[PackedPart]:
        epoch, is_train, number = place_of(number, self._train.plan.num_steps, self._num_epoch)
        if is_train:
            return self._train.pack(self._train.read(epoch, number))
        return self._eval.pack(number)


def out_of_memory(plan: TrainPlan, num_bytes: int) -> str:
    """What to tell a user whose data actor had not enough memory for a batch of so many bytes."""
    return (
        f"a data actor ran out of memory while it made a batch of {plan.num_own} samples of each of {len(plan.selected)} "
        f"streams, {num_bytes / 2**20:.1f} MiB; take a smaller batch_size or more workers, fewer data actors a "
        "node (data_cpus), or nodes with more memory."
    )


def _packed_table(number: int, parts: list[PackedPart]) -> pyarrow.Table:
    """One row an array; the arrays' memory is the table's, without a copy."""
    rows = [
        pyarrow.table(
            [[number], [part], [name], [values.dtype.str], [list(values.shape)], _binary(values)],
            schema=_SCHEMA,
        )
        for part, packed in enumerate(parts)
        for name, values in packed.columns.items()
    ]
    return pyarrow.concat_tables(rows)


def _binary(values: NDArray[Any]) -> pyarrow.Array:
    data = pyarrow.py_buffer(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    offsets = pyarrow.py_buffer(np.array([0, values.nbytes], dtype=np.int64))
    return pyarrow.Array.from_buffers(pyarrow.large_binary(), 1, [None, offsets, data])


def _error_table(number: int, message: str) -> pyarrow.Table:
    values = [[number], [0], [_ERROR], [""], [[]], [message.encode()]]
    return pyarrow.table(values, schema=_SCHEMA)


def _packed_batches(table: pyarrow.Table) -> Iterator[tuple[int, list[dict[str, NDArray[Any]]]]]:
    """The numbers of the batches of a table, and their arrays by part, which share its memory.

    Raises:
        DataError: the message of the data actor that could not make the batch.
    """
    described = table.drop_columns(["data"]).to_pylist()
    data = (value for chunk in table.column("data").chunks for value in chunk)
    for number, rows in itertools.groupby(
        zip(described, data, strict=True), key=lambda row: row[0]["number"]
    ):
        parts: list[dict[str, NDArray[Any]]] = []
        for row, value in rows:
            if row["column"] == _ERROR:
                raise DataError(value.as_py().decode())
            if row["part"] == len(parts):
                parts.append({})
            flat = np.frombuffer(value.as_buffer(), np.dtype(row["dtype"]))
            parts[row["part"]][row["column"]] = flat.reshape(row["shape"])
        yield number, parts


class RayLoader:
    """A `batches.Loader` whose batches data actors make.

    Args:
        batches: of the run, for this worker.
        num_epochs: of the run.
        num_actors: how many processes make this worker's batches, each with one CPU.
        timeout_s: how long a batch may take, the start of the actors included.
        may_fall_back: whether threads of this process make the batches if none comes in time.
    """

    def __init__(
        self,
        batches: RunBatches,
        *,
        num_epochs: int,
        num_actors: int,
        timeout_s: float | None = None,
        may_fall_back: bool = False,
    ) -> None:
        self.note = ""
        """What a user should know: that the actors did not come."""
        self.batches = batches
        self._timeout_s = timeout_s
        self._may_fall_back = may_fall_back
        self._num_steps = batches.train.num_steps
        self._num_epoch = batches.num_epoch
        self._end = num_epochs * self._num_epoch
        self._num_actors = num_actors
        self._next: int | None = None
        self._items: Generator[tuple[int, Batch], None, None] | None = None

    def train(
        self, plan: TrainPlan, *, epoch: int, first_step: int, dtype: torch.dtype
    ) -> Iterator[Batch]:
        """As `Loader.train`."""
        assert plan == self.batches.train, "the actors have the plan of another run"
        first = epoch * self._num_epoch + first_step
        num_batches = self._num_steps - first_step

        def local(done: int) -> Iterator[Batch]:
            rows = {s.name: self.batches.train_split.rows(s) for s in plan.selected}
            return planned_batches(
                plan, rows, epoch=epoch, first_step=first_step + done, dtype=dtype
            )

        return self._between(first, first + num_batches, dtype, local)

    def evaluate(self, plan: EvalPlan, *, epoch: int, dtype: torch.dtype) -> Iterator[Batch]:
        """As `Loader.evaluate`."""
        assert plan == self.batches.evaluation, "the actors have the plan of another run"
        first = epoch * self._num_epoch + self._num_steps

        def local(done: int) -> Iterator[Batch]:
            rows = {s.name: self.batches.eval_split.rows(s) for s in plan.selected}
            return itertools.islice(planned_eval_batches(plan, rows, dtype=dtype), done, None)

        return self._between(first, (epoch + 1) * self._num_epoch, dtype, local)

    def close(self) -> None:
        """Ends the execution and its actors."""
        if self._items is not None:
            self._items.close()
        self._items = self._next = None

    def _between(
        self, first: int, end: int, dtype: torch.dtype, local: Callable[[int], Iterator[Batch]]
    ) -> Iterator[Batch]:
        """The batches from a number to another.

        Args:
            first, end: the numbers.
            dtype: of images, depths and normals.
            local: makes them in this process, without the first so many.
        """
        for wanted in range(first, end):
            if not self.note:
                try:
                    batch = self._take(wanted, dtype)
                except TimeoutError as error:
                    self._give_up(error)
            if self.note:
                yield from local(wanted - first)
                return
            yield batch

    def _take(self, wanted: int, dtype: torch.dtype) -> Batch:
        if self._next != wanted:
            self.close()
            self._items = prefetched(
                lambda: self._from(wanted, dtype), 1, timeout_s=self._timeout_s
            )
        assert self._items is not None
        number, batch = next(self._items)
        assert number == wanted, "Ray Data keeps the order of rows"
        self._next = wanted + 1
        return batch

    def _give_up(self, error: TimeoutError) -> None:
        """Notes that no batch came in time.

        Raises:
            DataError: it was asked for data actors and nothing else.
        """
        waited = (
            f"no batch came from {self._num_actors} data actors within {self._timeout_s:g} s: the cluster has no free CPU for "
            "them, or reading stands still"
        )
        if not self._may_fall_back:
            raise DataError(
                f"{waited}; free CPUs or lower data_cpus, or take data='worker'."
            ) from error
        self.note = f"{waited}; the worker's own threads made the batches, which are the same."
        logger.warning(self.note)
        self.close()

    def _from(self, first: int, dtype: torch.dtype) -> Iterator[tuple[int, Batch]]:
        """All batches from a number to the end of the run, whatever dies meanwhile."""
        train = TrainBatches(self.batches.train, {})
        evaluation = EvalBatches(self.batches.evaluation, {})
        failures = 0
        while first < self._end:
            try:
                for number, parts in self._execute(first):
                    place = place_of(number, self._num_steps, self._num_epoch)
                    if place.is_train:
                        packed = _with_streams(train.plan.selected, parts)
                        yield number, train.unpack(packed, dtype)
                    else:
                        packed = _with_streams((evaluation.stream_of(place.number),), parts)
                        yield number, evaluation.unpack(packed, dtype)
                    first, failures = number + 1, 0
            except ray.exceptions.RayError as error:
                failures += 1
                logger.warning("data actors start again at batch %d: %s", first, _reason(error))
                if failures < MAX_FAILURES:
                    continue
                if _is_out_of_memory(error):
                    message = out_of_memory(train.plan, self.batches.cost().num_bytes)
                    raise DataError(message) from error
                raise

    def _execute(self, first: int) -> Iterator[tuple[int, list[dict[str, NDArray[Any]]]]]:
        """One execution of Ray Data; its batches until the end, or until it has had `MAX_TASKS`."""
        cost = self.batches.cost()
        size = min(MAX_TASK_BATCHES, TASK_BYTES / cost.num_bytes, TASK_S / cost.seconds)
        size = max(1, int(size))
        firsts = range(first, self._end, size)[:MAX_TASKS]
        rows = [{"first": n, "count": min(size, self._end - n)} for n in firsts]
        with quiet(), ray.data.DataContext.current(self._context(size * cost.num_bytes)):
            plan = ray.data.from_items(rows, override_num_blocks=len(rows))
            made = plan.map_batches(
                DataActor,
                fn_constructor_kwargs={"batches": self.batches},
                batch_size=None,
                batch_format="numpy",
                compute=ActorPoolStrategy(
                    size=self._num_actors, max_tasks_in_flight_per_actor=AHEAD
                ),
                num_cpus=1,
                max_restarts=0,  # an actor that restarts waits for a CPU that may not come back
            )
            for table in made.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=1
            ):
                yield from _packed_batches(table)

    def _context(self, task_bytes: int) -> DataContext:
        context = DataContext.get_current().copy()
        context.execution_options = ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources.for_limits(
                cpu=self._num_actors,
                object_store_memory=math.ceil(AHEAD * self._num_actors * task_bytes * 1.1),
            ),
        )
        return context


def _with_streams(
    streams: Sequence[Stream], parts: Sequence[Mapping[str, NDArray[Any]]]
) -> list[PackedPart]:
    return [PackedPart(stream, dict(part)) for stream, part in zip(streams, parts, strict=True)]


def _reason(error: BaseException) -> str:
    """The last line of an error of Ray, which says most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor, or the kernel, ended a data actor."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or (
        isinstance(error, ray.exceptions.ActorDiedError) and "OOM" in str(error)
    )
