"""A table of photographs and their labels as a data set: each column beside the paths is a task.

Owns reading the table (CSV or Parquet), what its columns mean, and its splits:

    image            path of a photograph, from the table's folder on
    split            "train", "val" or "test"; without it 60, 20 and 20 % of the rows, drawn
    any other one    a task by its name: text or whole numbers are classes (0 and 1 alone: yes or no),
                     other numbers are values; an empty cell is a label that is not known
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.files import listing
from repmtl_ray.data.office import IMAGENET, SIZE
from repmtl_ray.data.photographs import decode_photograph
from repmtl_ray.data.stream import Kind, MissingSplitError, Sample, Stream

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

NAME = "image_table"
SPLIT = "split"
_SPLITS = ("train", "val", "test")
_SEED = 0
_NOTE = (
    f"{NAME}: the splits are this project's own (60, 20 and 20 % of the rows), because the table has "
    "no column 'split'."
)
_MAX_CLASSES = 65_536


@dataclass(frozen=True)
class Column:
    """The labels of a task.

    Args:
        kind: of the task.
        labels: [rows]; classes as numbers.
        num_classes: of the kind "class".
    """

    kind: Kind
    labels: NDArray[Any]
    num_classes: int = 0


@dataclass(frozen=True)
class Table:
    """A table whose columns are understood.

    Args:
        files: of the photographs, as written.
        splits: [rows].
        columns: by task.
        has_splits: whether the table says the splits.
    """

    files: tuple[str, ...]
    splits: NDArray[np.str_]
    columns: Mapping[str, Column]
    has_splits: bool


def open_split(path: Path, split: str, *, size: tuple[int, int] | None) -> Stream:
    """The photographs of one split, with the labels of all tasks.

    Args:
        path: of the table.
        split: "train", "val" or "test".
        size: (height, width) that photographs are resized to, bilinearly; None takes (224, 224).

    Raises:
        ValueError: a table that cannot be read, columns that mean nothing, photographs that are
            missing, an empty split.
    """
    table = read_table(path)
    rows = np.flatnonzero(table.splits == split)
    if not len(rows):
        raise MissingSplitError(f"{NAME}: {path} has no row of the split {split!r}.")
    files = [table.files[row] for row in rows]
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(
            f"{NAME}: {len(missing)} photographs of the split {split!r} are missing: "
            f"{listing(missing)}; paths are relative to {path.parent}."
        )
    return Stream(
        name=NAME,
        kinds={name: column.kind for name, column in table.columns.items()},
        num_samples=len(rows),
        load=_Loader(
            root=path.parent,
            files=tuple(files),
            labels={name: column.labels[rows] for name, column in table.columns.items()},
            size=size or SIZE,
        ),
        normalize=IMAGENET,
        notes=() if table.has_splits else (_NOTE,),
        image_size=size or SIZE,
    )


def tasks_in(path: Path) -> tuple[Task, ...]:
    """A task for every column of labels, in the table's order.

    Raises:
        ValueError: a table that cannot be read, or columns that mean nothing.
    """
    from repmtl_ray.tasks import Binary, Classification, Regression

    return tuple(
        Classification(name=name, num_classes=column.num_classes)
        if column.kind == "class"
        else Binary(name=name)
        if column.kind == "binary"
        else Regression(name=name)
        for name, column in read_table(path).columns.items()
    )


def read_table(path: Path) -> Table:
    """The table, read again when its file has changed.

    Raises:
        ValueError: as `tasks_in`.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(
            f"{NAME}: {path} cannot be read ({error}); set data.path to a .csv or .parquet file."
        ) from error
    return _read(path, changed)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int) -> Table:
    try:
        if path.suffix.lower() == ".csv":
            options = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
            table = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{NAME}: {path} cannot be read as a table ({reason}); expected a .csv or a .parquet file."
        ) from error
    names = [name for name in table.column_names if name not in (IMAGE, SPLIT)]
    files = table.column(IMAGE).to_pylist() if IMAGE in table.column_names else []
    if not files or not names or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"{NAME}: {path} has the columns {', '.join(table.column_names)} and {table.num_rows} rows; "
            f"expected rows with a column {IMAGE!r} of paths, without gaps, and one for each task."
        )
    return Table(
        files=tuple(files),
        splits=_splits_of(path, table),
        columns={name: _column(path, name, table.column(name)) for name in names},
        has_splits=SPLIT in table.column_names,
    )


def _splits_of(path: Path, table: pa.Table) -> NDArray[np.str_]:
    if SPLIT not in table.column_names:
        order = np.random.default_rng(_SEED).permutation(table.num_rows)
        shares = np.searchsorted([0.6, 0.8], order / table.num_rows, side="right")
        return np.array(_SPLITS)[shares]
    given = table.column(SPLIT).to_pylist()
    strange = sorted({str(split) for split in given} - set(_SPLITS))
    if strange:
        raise ValueError(
            f"{NAME}: {path} has the splits {listing(strange)}; expected {', '.join(_SPLITS)}."
        )
    return np.array(given)


def _column(path: Path, name: str, values: pa.ChunkedArray) -> Column:
    """What the labels of a column are."""
    kind = values.type
    if pa.types.is_boolean(kind):
        values = values.cast(pa.int64())
    if pa.types.is_floating(values.type):
        return Column("value", values.fill_null(float("nan")).to_numpy().astype(np.float32))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        texts = values.to_pylist()
        classes = sorted({text for text in texts if text is not None})
        number_of = {text: number for number, text in enumerate(classes)}
        labels = np.array([number_of.get(text, IGNORE_LABEL) for text in texts], dtype=np.int64)
    elif pa.types.is_integer(values.type):
        labels = values.fill_null(IGNORE_LABEL).to_numpy().astype(np.int64)
        if labels.max() <= 1:
            return Column("binary", labels)
    else:
        raise ValueError(
            f"{NAME}: {path}, column {name!r} holds {kind}; expected text, whole numbers or numbers."
        )
    number = int(labels.max()) + 1
    if not 2 <= number <= _MAX_CLASSES or labels.min() < IGNORE_LABEL:
        raise ValueError(
            f"{NAME}: {path}, column {name!r} has the classes {labels.min()} to {labels.max()}; expected "
            f"at least two, from 0 to at most {_MAX_CLASSES - 1} (a number that is no class is written "
            "with a decimal point); remove a column that is no task."
        )
    return Column("class", labels, number)


@dataclass(frozen=True)
class _Loader:
    root: Path
    files: tuple[str, ...]
    labels: Mapping[str, NDArray[Any]]
    size: tuple[int, int]

    def __call__(self, index: int) -> Sample:
        file = self.files[index]
        photograph = decode_photograph(self.root / file, f"{NAME}: {file}")
        resized = photograph.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return {
            SAMPLE_ID: np.array(index, dtype=np.int64),
            IMAGE: np.asarray(resized, dtype=np.uint8),
            **{name: np.asarray(labels[index]) for name, labels in self.labels.items()},
        }
