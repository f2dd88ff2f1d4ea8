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

import pyarrow
import ray
from numpy.typing import NDArray
from ray.data import Dataset

from repmtl_ray.conversion import check, shown
from repmtl_ray.data.blocks import index_of, over_blocks, quiet
from repmtl_ray.data.cache import CachedSplit, warn_if_large
from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.custom_check import BlockCheck, Report, explained, reason_of, regular
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

Rows: TypeAlias = "Dataset | StreamedRows | Mapping[str, Dataset]"
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
            anew in every epoch. Tasks with samples of their own, as the domains of Office, come in a
            Dataset each, by names of your own: a task belongs to the one that has its column, and a
            global batch has `batch_size` samples of each.
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

    train: Rows
    evaluation: Rows
    tasks: tuple[Task, ...]
    normalize: Normalization | None = None
    inputs: tuple[str, ...] = (IMAGE,)
    collate: Collate | None = None

    def __post_init__(self) -> None:
        for name in ("train", "evaluation"):
            rows = getattr(self, name)
            several = isinstance(rows, Mapping) and len(rows) > 0
            is_right = isinstance(rows, Dataset | StreamedRows) or several
            check(is_right, f"CustomData.{name}", rows, f"a Ray Dataset, {_MADE_BY}")
            for source, part in rows.items() if several else ():
                check(isinstance(source, str), f"a key of CustomData.{name}", source, "a name")
                where = f"CustomData.{name}[{source!r}]"
                check(isinstance(part, Dataset), where, part, f"a Ray Dataset, {_MADE_BY}")
        sources = [
            set(rows) if isinstance(rows, Mapping) else {NAME}
            for rows in (self.train, self.evaluation)
        ]
        check(
            sources[0] == sources[1],
            "CustomData.evaluation",
            sorted(sources[1]),
            f"the sources of train, {sorted(sources[0])}",
        )
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
    splits: dict[str, OpenedSplit] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    for name, rows in (("train", data.train), ("evaluation", data.evaluation)):
        parts = []
        for source in data.train if isinstance(data.train, Mapping) else (NAME,):
            where = f"{name}, {source}" if isinstance(rows, Mapping) else name
            part = rows[source] if isinstance(rows, Mapping) else rows
            split, sizes[where], problems = _open(where, part, data, source)
            wrong += problems
            parts += [split] if split is not None else []
        if parts:
            splits[name] = _joined(parts)
    if not wrong:
        wrong = _misplaced(splits, data)
    if not wrong and len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} in {where}" for where, size in sizes.items())
        wrong = [f"image: {found}; expected one size"]
    if wrong:
        ways = "one way" if len(wrong) == 1 else f"{len(wrong)} ways"
        begin = f"the data breaks the column contract in {ways} (docs/guide.md, data of your own):"
        raise ValueError((" " if len(wrong) == 1 else "\n").join([begin, *wrong]))
    return splits["train"], splits["evaluation"], next(iter(sizes.values()))


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


def _open(name: str, rows: Dataset | StreamedRows, data: CustomData, source: str = NAME) -> Opened:
    """The rows of one source with the size of their images, or what is wrong with them; of several
    sources, each has the tasks that it has columns of."""
    dataset = rows if isinstance(rows, Dataset) else rows.dataset
    try:
        with quiet():
            first = None if isinstance(rows, Dataset) else first_table(dataset)
            there = set((dataset.columns() or []) if first is None else first.column_names)
            is_one = not isinstance(data.train, Mapping)
            tasks = [task for task in data.tasks if is_one or task.name in there]
            block_check = _block_check(tasks, data)
            columns = (SAMPLE_ID, *data.inputs, *block_check.kinds)
            wanted = [column for column in columns if column in there]
            if not wanted or not tasks:
                have = f"it has {', '.join(sorted(there))}" if there else "it is empty"
                expected = ", ".join(columns if tasks else [task.name for task in data.tasks])
                one_of = "" if tasks else "at least one of "
                return None, None, [f"{name}: expected {one_of}the columns {expected}; {have}"]
            may_lack = {n: kind for n, kind in block_check.kinds.items() if kind in _MAY_BE_MISSING}
            # With `collate`, inputs may have another length in every row.
            lists = (*block_check.kinds, *(data.inputs if data.collate is None else ()))
            chosen = dataset.select_columns(wanted)
            if may_lack or data.inputs != (IMAGE,):
                chosen = chosen.map_batches(
                    cast(Any, regular),
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
                first = regular(first.select(wanted), kinds=may_lack, lists=lists)
                reports = [block_check(first)]
    except (ray.exceptions.RayError, ValueError, TypeError, pyarrow.ArrowException) as error:
        return None, None, [f"{name}: its rows cannot be read: {reason_of(error)}"]
    wrong = [f"{name}: {text}" for text in explained(reports, there)]
    if wrong:
        return None, None, wrong
    size = next((report.size for report in reports if report.size), None)
    num_rows = sum(len(report.summary.ids) for report in reports)
    if isinstance(rows, StreamedRows):
        stream = _stream(data, tasks, rows.num_rows, size)
        checked_rows = checked(name, chosen, block_check)
        first = with_checksums(first, reports[0])
        return streamed_split(name, rows, stream, checked_rows, first), size, []
    return _cached(_stream(data, tasks, num_rows, size, source), blocks, reports), size, []


def _block_check(tasks: Sequence[Task], data: CustomData) -> BlockCheck:
    kinds = {task.name: task.kind for task in tasks}
    numbers = {task.name: _number_of(task) for task in tasks}
    num_classes = {task: number for task, number in numbers.items() if number is not None}
    return BlockCheck(kinds, num_classes, data.inputs, data.collate is not None)


def _cached(
    stream: Stream, blocks: tuple[ray.ObjectRef[Any], ...], reports: Sequence[Report]
) -> CachedSplit:
    """The split of rows that are kept, whose blocks are right."""
    num_bytes = sum(report.num_bytes for report in reports)
    warn_if_large(num_bytes)
    cached = index_of(stream, blocks, [report.summary for report in reports], any_ids=True)
    return CachedSplit(
        streams=(stream,),
        cached={stream.name: cached},
        num_bytes=num_bytes,
        fingerprint=fingerprint_of({stream.name: cached.contents}),
    )


def _joined(parts: Sequence[OpenedSplit]) -> OpenedSplit:
    """The split of several sources; of one, that itself."""
    if len(parts) == 1:
        return parts[0]
    kept = [part for part in parts if isinstance(part, CachedSplit)]
    cached = {name: stored for part in kept for name, stored in part.cached.items()}
    return CachedSplit(
        streams=tuple(stream for part in kept for stream in part.streams),
        cached=cached,
        num_bytes=sum(part.num_bytes for part in kept),
        fingerprint=fingerprint_of({name: stored.contents for name, stored in cached.items()}),
    )


def _misplaced(splits: Mapping[str, OpenedSplit], data: CustomData) -> list[str]:
    """What is wrong with the tasks of several sources: each is in one of them, always the same."""
    wrong = []
    for task in data.tasks:
        places = {
            name: [stream.name for stream in split.streams if task.name in stream.kinds]
            for name, split in splits.items()
        }
        if (
            any(len(found) != 1 for found in places.values())
            or len(set(map(str, places.values()))) > 1
        ):
            found = ", ".join(
                f"in {name} {' and '.join(of) or 'none'}" for name, of in places.items()
            )
            wrong.append(
                f"{task.name}: expected in one source, the same in both data sets; it is {found}"
            )
    return wrong


def _stream(
    data: CustomData,
    tasks: Sequence[Task],
    num_samples: int,
    size: tuple[int, int] | None,
    name: str = NAME,
) -> Stream:
    return Stream(
        name=name,
        kinds={task.name: task.kind for task in tasks},
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


def _not_numbered(index: int) -> Sample:
    raise AssertionError("samples of a Ray Dataset are only in the object store")
