"""Data sets of your own for `fit(data=...)`: Ray Datasets that keep the column contract.

Owns `CustomData`, the check that explains every violation at once, and the way of the rows into the
object store. Rows that are too many for it are `streamed`. What the columns must hold is in
`stream.Kind`; single samples are checked in `validation`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast, get_args

import numpy as np
import pyarrow
import ray
from numpy.typing import NDArray
from ray.data import Dataset
from ray.data.extensions import ArrowTensorArray

from repmtl_ray.conversion import check, shown
from repmtl_ray.data.arrow_arrays import array_of_lists
from repmtl_ray.data.blocks import index_of, over_blocks, quiet
from repmtl_ray.data.cache import CachedSplit, warn_if_large
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.custom_check import BlockCheck, Report, explained, reason_of
from repmtl_ray.data.stream import Kind, Normalization, Sample, Stream, fingerprint_of
from repmtl_ray.data.streamed import (
    StreamedRows,
    StreamedSplit,
    checked,
    first_table,
    streamed_split,
    with_checksums,
)

if TYPE_CHECKING:
    from torch import Tensor

    from repmtl_ray.tasks import Task

Collate: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, Union["Tensor", Any]]]
_MAY_BE_MISSING = ("class", "binary", "value")
NAME = "custom"
_MADE_BY = "for example ray.data.from_pandas(frame), from_items(rows) or read_parquet(folder)"


@dataclass(frozen=True, kw_only=True)
class CustomData:
    """What to train and to evaluate on, as Ray Datasets.

    Every row has `sample_id` (an integer, unique in its data set: with seed and epoch it decides
    the row's augmentation), the inputs of the encoder and one column a task, by the task's name, as
    `stream.Kind` says. Samples are numbered in the order of their ids, so the order of rows and
    blocks does not matter. A sample without a label for a task has its ignore value (-1, value NaN,
    depth 0, normal 0); a class, a binary label or a value may also be missing (None, NaN).

    Args:
        train, evaluation: the rows; a Dataset is read once, into the object store, `StreamedRows`
            anew in every epoch.
        tasks: what to learn, in order.
        normalize: mean and deviation of images, by channel; None leaves them in 0..1.
        inputs: the columns that the encoder takes. The column "image" is a picture, which is
            normalised and may be augmented; the others are numbers of any shape, the same in all
            rows. An encoder gets one input as its argument, and several by name.
        collate: from the input columns of a batch, stacked by name (without the image; arrays of
            several lengths come in an array of objects), to the tensors that the encoder takes by
            name, for example padded tokens with their mask. It must make each row from that row's
            sample alone. None takes every column as a tensor.
    """

    train: Dataset | StreamedRows
    evaluation: Dataset | StreamedRows
    tasks: tuple[Task, ...]
    normalize: Normalization | None = None
    inputs: tuple[str, ...] = (IMAGE,)
    collate: Collate | None = None

    def __post_init__(self) -> None:
        for name in ("train", "evaluation"):
            rows = getattr(self, name)
            is_right = isinstance(rows, Dataset | StreamedRows)
            check(is_right, f"CustomData.{name}", rows, f"a Ray Dataset, {_MADE_BY}")
        object.__setattr__(self, "inputs", _checked_inputs(self.inputs))
        object.__setattr__(self, "tasks", _checked_tasks(self.tasks, self.inputs))
        check(
            self.collate is None or callable(self.collate),
            "CustomData.collate",
            self.collate,
            "None or a function",
        )
        object.__setattr__(self, "normalize", _checked_normalization(self.normalize))

    @property
    def is_streamed(self) -> bool:
        """Whether any rows are read anew in every epoch."""
        return any(isinstance(rows, StreamedRows) for rows in (self.train, self.evaluation))


OpenedSplit: TypeAlias = CachedSplit | StreamedSplit


def open_custom(data: CustomData) -> tuple[OpenedSplit, OpenedSplit, tuple[int, int] | None]:
    """Reads, checks and keeps both data sets; of rows that are streamed, the first ones.

    Returns:
        Training and evaluation samples; (height, width) of the images, None without images.

    Raises:
        ValueError: everything that is wrong with tasks and rows, in one message.
    """
    wrong: list[str] = []
    splits, sizes = [], []
    for name, rows in (("train", data.train), ("evaluation", data.evaluation)):
        split, size, problems = _open(name, rows, data)
        wrong += problems
        splits.append(split)
        sizes.append(size)
    if not wrong and sizes[0] != sizes[1]:
        wrong = [f"image: {sizes[0]} in train, {sizes[1]} in evaluation; expected one size"]
    if wrong:
        ways = "one way" if len(wrong) == 1 else f"{len(wrong)} ways"
        begin = f"the data breaks the column contract in {ways} (docs/guide.md, data of your own):"
        raise ValueError((" " if len(wrong) == 1 else "\n").join([begin, *wrong]))
    train, evaluation = splits
    assert train is not None, "without problems there is a split"
    assert evaluation is not None, "without problems there is a split"
    return train, evaluation, sizes[0]


def _checked_inputs(inputs: Any) -> tuple[str, ...]:
    """The names of the input columns as a tuple.

    Raises:
        ValueError: no names, one twice or the name of another column.
    """
    given = (inputs,) if isinstance(inputs, str) else inputs
    is_right = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
    expected = 'names of columns, each once, for example ("user", "item", "price")'
    is_right = is_right and len(set(given)) == len(given) > 0 and SAMPLE_ID not in given
    check(is_right, "CustomData.inputs", inputs, expected)
    return tuple(given)


def _checked_tasks(tasks: Any, inputs: Sequence[str]) -> tuple[Task, ...]:
    """The tasks of custom data as a tuple.

    Raises:
        ValueError: something else than tasks, a name twice or one of another column, a class of the
            user's own that says too little.
    """
    from repmtl_ray.tasks import Task

    if isinstance(tasks, Task):
        tasks = (tasks,)
    expected = 'tasks of repmtl_ray.tasks, for example (Depth(name="depth"),)'
    check(isinstance(tasks, list | tuple) and bool(tasks), "CustomData.tasks", tasks, expected)
    for task in tasks:
        check(isinstance(task, Task), "CustomData.tasks: an entry", task, expected)
        _check_task_class(task)
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise ValueError(f"CustomData.tasks: {name!r} comes {count} times; names must differ.")
        if name in (*inputs, IMAGE, SAMPLE_ID):
            raise ValueError(
                f"CustomData.tasks: {name!r} is the name of another column; choose a different one."
            )
    return tuple(tasks)


def _check_task_class(task: Task) -> None:
    """Refuses a class of the user's own that does not say what its column and its metrics are."""
    from repmtl_ray.metrics import higher_is_better  # needs torch, which reading tasks do not

    where, kinds = f"task {task.name!r}: {type(task).__name__}", get_args(Kind)[1:]
    for name in ("kind", "dense", "metric_directions"):
        if not hasattr(task, name):
            raise ValueError(
                f"{where} has no attribute {name!r}; set it on the class as the tasks of "
                "repmtl_ray.tasks do."
            )
    check(task.kind in kinds, f"{where}.kind", task.kind, "one of " + ", ".join(kinds))
    for metric, is_up in task.metric_directions.items():
        if higher_is_better(metric) is not is_up:
            known = {None: "do not know", True: "take for better if higher"}
            known[False] = "take for better if lower"
            end = "_up" if is_up else "_down"
            raise ValueError(
                f"{where} has the metric {metric!r}, which delta_p and the choice of the best epoch "
                f"{known[higher_is_better(metric)]}; name it so that it ends in {end!r}."
            )


def _checked_normalization(given: Any) -> Normalization | None:
    """Two times three numbers, or None.

    Raises:
        ValueError: something else, or a deviation that is not above 0.
    """
    if given is None:
        return None
    expected = "None, or Normalization(mean, std) with three finite numbers each and std above 0"
    try:
        mean, std = (tuple(float(value) for value in part) for part in given)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"CustomData.normalize is {shown(given)}; expected {expected}.") from None
    is_right = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std)))
    check(is_right and min(std) > 0, "CustomData.normalize", given, expected)
    return Normalization(mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))


Opened: TypeAlias = tuple[OpenedSplit | None, tuple[int, int] | None, list[str]]


def _open(name: str, rows: Dataset | StreamedRows, data: CustomData) -> Opened:
    """One data set with the size of its images, or what is wrong with it."""
    kinds = {task.name: task.kind for task in data.tasks}
    numbers = {task.name: _number_of(task) for task in data.tasks}
    num_classes = {task: number for task, number in numbers.items() if number is not None}
    may_lack = {n: kind for n, kind in kinds.items() if kind in _MAY_BE_MISSING}
    block_check = BlockCheck(kinds, num_classes, data.inputs, data.collate is not None)
    columns = (SAMPLE_ID, *data.inputs, *kinds)
    dataset, first = (
        (rows, None) if isinstance(rows, Dataset) else (rows.dataset, pyarrow.table({}))
    )
    try:
        with quiet():
            if first is not None:
                first = first_table(dataset)
            there = set((dataset.columns() or []) if first is None else first.column_names)
            wanted = [column for column in columns if column in there]
            if not wanted:
                have = f"it has {', '.join(sorted(there))}" if there else "it is empty"
                expected = ", ".join(columns)
                return None, None, [f"{name}: expected the columns {expected}; {have}"]
            chosen = dataset.select_columns(wanted)
            # With `collate`, inputs may have another length in every row.
            lists = (*kinds, *(data.inputs if data.collate is None else ()))
            if may_lack or data.inputs != (IMAGE,):
                chosen = chosen.map_batches(
                    cast(Any, _regular),
                    batch_format="pyarrow",
                    batch_size=None,
                    fn_kwargs={"kinds": may_lack, "lists": lists},
                    # Tasks without a CPU run also while workers hold all of them.
                    num_cpus=0 if first is None else None,
                )
            if first is None:
                blocks = tuple(chosen.materialize().to_arrow_refs())
                reports = over_blocks(block_check, blocks)
            else:
                first = _regular(first.select(wanted), kinds=may_lack, lists=lists)
                reports = [block_check(first)]
    except (ray.exceptions.RayError, ValueError, TypeError, pyarrow.ArrowException) as error:
        return None, None, [f"{name}: its rows cannot be read: {reason_of(error)}"]
    wrong = [f"{name}: {text}" for text in explained(reports, there)]
    if wrong:
        return None, None, wrong
    size = next((report.size for report in reports if report.size), None)
    if isinstance(rows, StreamedRows):
        stream, right = _stream(data, rows.num_rows, size), checked(name, chosen, block_check)
        return (
            streamed_split(name, rows, stream, right, with_checksums(first, reports[0])),
            size,
            [],
        )
    return _cached(data, blocks, reports, size), size, []


def _cached(
    data: CustomData,
    blocks: tuple[ray.ObjectRef[Any], ...],
    reports: Sequence[Report],
    size: tuple[int, int] | None,
) -> CachedSplit:
    """The split of rows that are kept, whose blocks are right."""
    summaries = [report.summary for report in reports]
    stream = _stream(data, sum(len(summary.ids) for summary in summaries), size)
    num_bytes = sum(report.num_bytes for report in reports)
    warn_if_large(num_bytes)
    cached = index_of(stream, blocks, summaries, any_ids=True)
    return CachedSplit(
        streams=(stream,),
        cached={NAME: cached},
        num_bytes=num_bytes,
        fingerprint=fingerprint_of({NAME: cached.contents}),
    )


def _stream(data: CustomData, num_samples: int, size: tuple[int, int] | None) -> Stream:
    return Stream(
        name=NAME,
        kinds={task.name: task.kind for task in data.tasks},
        num_samples=num_samples,
        load=_not_numbered,
        normalize=data.normalize,
        image_size=size,
        inputs=data.inputs,
        make_inputs=data.collate,
    )


def _number_of(task: Task) -> int | None:
    """Of classes, or of the numbers that a label holds; None where the task does not say it."""
    if task.kind in ("class", "label"):
        return getattr(task, "num_classes", None)
    return task.num_targets


def _regular(
    table: pyarrow.Table, *, kinds: Mapping[str, Kind], lists: Sequence[str]
) -> pyarrow.Table:
    """The table with ignore values in its gaps, and with tensors in the place of lists of one length,
    which is what several numbers a sample are in a data frame and in Parquet files."""
    table = _with_ignore_values(table, kinds=kinds)
    for name in lists:
        if name in table.column_names:
            array = array_of_lists(table.column(name).combine_chunks())
            if array is not None:
                place, tensor = table.column_names.index(name), ArrowTensorArray.from_numpy(array)
                table = table.set_column(place, name, tensor)
    return table


def _with_ignore_values(table: pyarrow.Table, *, kinds: Mapping[str, Kind]) -> pyarrow.Table:
    """The table with -1 or NaN where a single label is missing.

    Columns without gaps stay as they are. Truth values become 0 and 1, whole floats integers,
    because a column of integers with gaps comes out of pandas as floats.
    """
    for name, kind in kinds.items():
        if name not in table.column_names:
            continue
        values = table.column(name)
        place, given = table.column_names.index(name), values.type
        if pyarrow.types.is_null(given):
            values = values.cast(pyarrow.float64())
        elif pyarrow.types.is_boolean(given):
            values = values.cast(pyarrow.int64())
        is_float = pyarrow.types.is_floating(values.type)
        if not is_float and not pyarrow.types.is_integer(values.type):
            continue  # several numbers a sample: their gaps are the user's to fill
        if kind == "value":
            values = values.fill_null(float("nan")) if is_float else values
        elif is_float:
            numbers = values.to_numpy(zero_copy_only=False)
            is_gap = np.isnan(numbers)
            if (numbers[~is_gap] == np.rint(numbers[~is_gap])).all():
                filled = np.where(is_gap, IGNORE_LABEL, numbers).astype(np.int64)
                values = pyarrow.chunked_array([filled])
        else:
            values = values.fill_null(IGNORE_LABEL)
        table = table.set_column(place, name, values)
    return table


def _not_numbered(index: int) -> Sample:
    raise AssertionError("samples of a Ray Dataset are only in the object store")
