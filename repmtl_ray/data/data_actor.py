"""A data actor: it makes a worker's batches by number, in whatever process it lives.

Owns the numbers of a run's batches, and the Arrow table in which packed batches travel, with the id of
the process that made them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from numpy.typing import NDArray

from repmtl_ray.data.cache import CheckedSplit
from repmtl_ray.data.plan import (
    DataError,
    EvalBatches,
    EvalPlan,
    PackedPart,
    TrainBatches,
    TrainPlan,
)
from repmtl_ray.data.sampler import Place

_ERROR = "error"
_MAKER = "maker"
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


def signed(table: pyarrow.Table, maker: str) -> pyarrow.Table:
    """The table of an actor's batches with the id of the process that made it, in a row of its own."""
    number = table.column("number")[0].as_py()
    values = [[number], [0], [_MAKER], [""], [[]], [maker.encode()]]
    return pyarrow.concat_tables([pyarrow.table(values, schema=_SCHEMA), table])


def makers_of(table: pyarrow.Table) -> set[str]:
    """The ids of the processes that made a table."""
    makers = table.filter(pyarrow.compute.equal(table.column("column"), _MAKER)).column("data")
    return {maker.decode() for maker in makers.to_pylist()}


def packed_batches(table: pyarrow.Table) -> Iterator[tuple[int, list[dict[str, NDArray[Any]]]]]:
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
            if row["column"] == _MAKER:
                continue
            if row["part"] == len(parts):
                parts.append({})
            flat = np.frombuffer(value.as_buffer(), np.dtype(row["dtype"]))
            parts[row["part"]][row["column"]] = flat.reshape(row["shape"])
        yield number, parts
