"""Rows of the user's own that are too many to keep: read in their own order, anew in every epoch.

Owns what the user says of such rows, their split, and the execution of a Ray Dataset in order; no
torch. Who reads them in a run is in `row_reader`, the check of a block in `custom_check`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow
from numpy.typing import NDArray
from ray.data import Dataset, ExecutionResources

from repmtl_ray.conversion import check, check_range
from repmtl_ray.data.blocks import quiet, views_of
from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.custom_check import BlockCheck, Report, explained
from repmtl_ray.data.sampler import Indices
from repmtl_ray.data.stream import Sample, Stream

if TYPE_CHECKING:
    from repmtl_ray.data.plan import Rows

RowsRead: TypeAlias = dict[int, int]
"""By their number, a checksum of so many of the first rows: of their content and their order."""
NUM_FIRST = 16
"""Rows that are read before training: a model is tried on them, and every pass begins with them."""
MAX_ROWS = 10**12
_ERROR, _CONTENT = "what is wrong", "checksum of the row"
"""Columns of checked blocks; no task has such a name."""


@dataclass(frozen=True, kw_only=True)
class StreamedRows:
    """A Ray Dataset that is read anew in every epoch, in its own order, and never kept in whole.

    The rows must come in the same order with the same content whenever the Dataset is executed.

    Args:
        dataset: the rows, as for `CustomData`; lazy.
        num_rows: how many it has, which decides the length of an epoch; `dataset.count()` counts
            them.
        shuffle_window: training rows that the reader holds in memory and draws the next row from;
            1 leaves the order as it is. Evaluation needs no window.
    """

    dataset: Dataset
    num_rows: int
    shuffle_window: int = 1024

    def __post_init__(self) -> None:
        kind = "a Ray Dataset, for example ray.data.read_parquet(folder)"
        check(isinstance(self.dataset, Dataset), "StreamedRows.dataset", self.dataset, kind)
        for name in ("num_rows", "shuffle_window"):
            value = getattr(self, name)
            check(type(value) is int, f"StreamedRows.{name}", value, "an integer, at least 1")
            check_range(f"StreamedRows.{name}", value, 1, MAX_ROWS)


@dataclass(frozen=True, kw_only=True)
class StreamedSplit:
    """A split whose rows come one after the other; otherwise as `cache.CachedSplit`.

    Args:
        name: "train" or "evaluation", for messages.
        streams: one, with as many samples as the user says.
        dataset: the rows, each block checked.
        window: of rows that the next one is drawn from.
        first: the first rows, in order.
        rows_read: the checksum of the first rows (`RowsRead`).
        fingerprint: of the first rows, the number of rows and the window.
    """

    name: str
    streams: tuple[Stream, ...]
    dataset: Dataset
    window: int
    first: tuple[Sample, ...]
    rows_read: RowsRead
    fingerprint: str

    @property
    def labelled(self) -> frozenset[str]:
        """All tasks: that one has no label is found when an epoch was read."""
        return frozenset(self.streams[0].kinds)

    def rows(self, stream: Stream) -> Rows:
        """The first rows alone, for a look at them."""
        return _FirstRows(self.first)


class _FirstRows:
    def __init__(self, first: Sequence[Sample]) -> None:
        self._first = first

    def __len__(self) -> int:
        return len(self._first)

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        return stacked([self._first[index] for index in indices], columns or list(self._first[0]))


def stacked(rows: Sequence[Sample], columns: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Rows by column; arrays of several lengths come in an array of objects."""
    found: dict[str, NDArray[Any]] = {}
    for name in columns:
        values = [row[name] for row in rows]
        if len({value.shape for value in values}) == 1:
            found[name] = np.stack(values)
        else:
            found[name] = np.empty(len(values), dtype=object)
            found[name][:] = values
    return found


def checked(name: str, dataset: Dataset, block_check: BlockCheck) -> Dataset:
    """The rows, of which every block is checked when it is read."""
    return dataset.map_batches(
        _checked_block,  # type: ignore[arg-type]  # annotated without pyarrow's tables
        batch_format="pyarrow",
        batch_size=None,
        fn_kwargs={"name": name, "block_check": block_check},
    )


def _checked_block(table: pyarrow.Table, *, name: str, block_check: BlockCheck) -> pyarrow.Table:
    """The block, or what is wrong with it: as data, because Ray Data would hide all but one fault."""
    if not table.num_rows:
        return table
    report = block_check(table)
    wrong = [f"{name}: {text}" for text in explained([report], set(table.column_names))]
    return pyarrow.table({_ERROR: wrong}) if wrong else with_checksums(table, report)


def with_checksums(table: pyarrow.Table, report: Report) -> pyarrow.Table:
    """A block of rows that are right, with what `rows_in_order` knows them by."""
    return table.append_column(_CONTENT, pyarrow.array(report.summary.contents))


def first_table(dataset: Dataset) -> pyarrow.Table:
    """The rows that a dataset begins with, at most `NUM_FIRST`."""
    # Not `dataset.limit`: a source that knows of it may list fewer files, and begin with other rows.
    with _in_order(dataset):
        tables: Iterable[Any] = dataset.iter_batches(batch_size=NUM_FIRST, batch_format="pyarrow")
        return next(iter(tables), pyarrow.table({})).slice(0, NUM_FIRST)


def streamed_split(
    name: str, rows: StreamedRows, stream: Stream, dataset: Dataset, first: pyarrow.Table
) -> StreamedSplit:
    """A split of rows of which the first ones are right.

    Args:
        name, stream, dataset: of the split.
        rows: what the user says of it.
        first: as `first_table`, with the columns of the split and its checksums.
    """
    samples, contents = zip(*_rows_of([first]), strict=True)
    known_by = (rows.num_rows, rows.shuffle_window, *contents)
    return StreamedSplit(
        name=name,
        streams=(stream,),
        dataset=dataset,
        window=rows.shuffle_window,
        first=samples,
        rows_read={len(samples): functools.reduce(checksum, contents, 0)},
        fingerprint=f"{zlib.crc32(repr(known_by).encode()):08x}",
    )


def checksum(before: int, content: int) -> int:
    """Of rows and one more.

    Args:
        before: the checksum of the rows; 0 of none.
        content: the checksum of the one that comes after them.
    """
    return zlib.crc32(content.to_bytes(4, "little"), before)


def _rows_of(tables: Iterable[Any]) -> Iterator[tuple[Sample, int]]:
    """The rows of blocks, each with its checksum.

    Raises:
        ValueError: what is wrong with a block.
    """
    for table in tables:
        if _ERROR in table.column_names:
            raise ValueError("\n".join(table.column(_ERROR).to_pylist()))
        columns = views_of(table) if table.num_rows else {}
        for place in range(table.num_rows):
            # Copies: a view would keep its whole block in the object store.
            row = {name: np.array(values[place]) for name, values in columns.items()}
            row[SAMPLE_ID] = row[SAMPLE_ID].astype(np.int64)
            yield row, int(row.pop(_CONTENT))


def rows_in_order(dataset: Dataset, num_cpus: int) -> Iterator[tuple[Sample, int]]:
    """All rows of a dataset, each with the checksum of its content; one execution.

    Args:
        dataset: whose blocks are checked.
        num_cpus: that its tasks may use.

    Raises:
        ValueError: what is wrong with a block.
    """
    with quiet(), _in_order(dataset, num_cpus):
        yield from _rows_of(
            dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        )


@contextlib.contextmanager
def _in_order(dataset: Dataset, num_cpus: int | None = None) -> Iterator[None]:
    """Executions of the dataset in the block keep the order of rows; its own settings come back."""
    context = dataset.context
    names = ("execution_options", "enable_progress_bars", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names}
    options = copy.copy(context.execution_options)
    options.preserve_order = True
    if num_cpus is not None:
        options.resource_limits = ExecutionResources.for_limits(cpu=num_cpus)
    context.execution_options = options
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
