"""Dense data in Parquet files, as data hubs mirror them: one row a frame, one column a target.

Owns finding the files of a split, their schema and reading rows; content is checked in `dense`.

    data/<split>-00000-of-00008.parquet, ... or <split>/*.parquet, or the files themselves in the
        folder; the splits are train and val (or validation), or test
    image         [3, H, W] or [H, W, 3] nested lists or tensors; floats in 0..1, or 0..255
    segmentation  [H, W]                 depth [1, H, W], [H, W, 1] or [H, W]
    normal        [3, H, W] or [H, W, 3] (nyuv2 only); other columns are not read

Rows are decoded one after the other, not by whole row groups, which hold hundreds of megabytes in
the published mirrors: a process keeps its place in the row groups that it reads, so that reading
upwards decodes everything once.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.npy import listing

_SPELLINGS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
_ROWS_AT_ONCE = 4
_PLACES_KEPT = 2  # row groups that a process is in the middle of


@dataclass(frozen=True)
class ParquetFrames:
    """One split of a mirror; `Frames` of `dense`.

    Args:
        dataset: begins every error message.
        root: folder that the files' names are relative to.
        files: in order; their rows are the frames.
        groups: of every row group in order: number of the file, number in the file, first frame.
        num_frames: in all.
        columns: by our name, the file's.
        shapes: of the first frame, by our names.
    """

    dataset: str
    root: Path
    files: tuple[str, ...]
    groups: tuple[tuple[int, int, int], ...]
    num_frames: int
    columns: Mapping[str, str]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def read(self, frame: int) -> Mapping[str, NDArray[Any]]:
        file, group, row = self._place(frame)
        path = self.root / self.files[file]
        try:
            values = _row(path, group, row, tuple(self.columns.values()))
        except (OSError, pa.ArrowException) as error:
            _forget(path)
            raise ValueError(
                f"{self.dataset}: {self.files[file]} row {self._row_in_file(frame)} cannot be read "
                f"({_first_line(error)}); copy the file again."
            ) from error
        return {
            ours: _array(values[theirs], f"{self.dataset}: {self.where(frame, ours)}")
            for ours, theirs in self.columns.items()
        }

    def where(self, frame: int, column: str) -> str:
        file, _, _ = self._place(frame)
        return f"{self.files[file]} row {self._row_in_file(frame)} column {self.columns[column]}"

    def _place(self, frame: int) -> tuple[int, int, int]:
        """Number of the file, of the row group in it, and of the row in that."""
        number = int(np.searchsorted([first for _, _, first in self.groups], frame, "right")) - 1
        file, group, first = self.groups[number]
        return file, group, frame - first

    def _row_in_file(self, frame: int) -> int:
        file, _, _ = self._place(frame)
        return frame - next(first for number, _, first in self.groups if number == file)


def open_frames(
    dense: DenseSet, root: Path, split: str, columns: Mapping[str, str]
) -> ParquetFrames:
    """One split of a mirror, its files and schemas checked, its first row read.

    Args:
        dense: what the files should hold.
        root: a folder.
        split: "train", "val" or "test".
        columns: our column names to the file's, where they differ.

    Raises:
        ValueError: no files of the split, one that is not Parquet or is cut off, no rows, a column
            that is not there (with those that are), schemas that disagree.
    """
    wanted = _wanted(dense, columns)
    files = _files(dense, root, split)
    groups: list[tuple[int, int, int]] = []
    num_frames, types = 0, None
    for number, path in enumerate(files):
        name = path.relative_to(root).as_posix()
        found = _opened(dense, path, name)
        schema, metadata = found.schema_arrow, found.metadata
        _check_columns(dense, name, schema, wanted)
        own = {column: str(schema.field(column).type) for column in wanted.values()}
        types = types or own
        for column, kind in own.items():
            if kind != types[column]:
                raise ValueError(
                    f"{dense.name}: {name} column {column} is {kind}, expected {types[column]} as "
                    f"in {files[0].relative_to(root).as_posix()}; take all files from one source."
                )
        for group in range(metadata.num_row_groups):
            if metadata.row_group(group).num_rows:
                groups.append((number, group, num_frames))
                num_frames += metadata.row_group(group).num_rows
    names = tuple(path.relative_to(root).as_posix() for path in files)
    if not num_frames:
        raise ValueError(f"{dense.name}: {listing(list(names))} has no rows in split {split}.")
    frames = ParquetFrames(dense.name, root, names, tuple(groups), num_frames, wanted)
    shapes = {column: values.shape for column, values in frames.read(0).items()}
    return ParquetFrames(dense.name, root, names, tuple(groups), num_frames, wanted, shapes)


def is_mirror(root: Path) -> bool:
    """Whether a folder holds Parquet files where mirrors have them."""
    return any(any(root.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))


def _wanted(dense: DenseSet, columns: Mapping[str, str]) -> dict[str, str]:
    for ours in columns:
        if ours not in dense.columns:
            raise ValueError(
                f"data.columns has {ours!r}, which is no column of {dense.name}; it has "
                f"{', '.join(dense.columns)}."
            )
    return {ours: columns.get(ours, ours) for ours in dense.columns}


def _files(dense: DenseSet, root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{dense.name}: {root} {state}; set data.path to the Parquet files' folder."
        )
    everything = sorted({*root.glob("*.parquet"), *root.glob("*/*.parquet")})
    found = [path for path in everything if _split_of(root, path) == split]
    if not found:
        names = [path.relative_to(root).as_posix() for path in everything]
        accepted = " or ".join(f"{name}-*.parquet" for name in _SPELLINGS[split])
        raise ValueError(
            f"{dense.name}: {root} has no Parquet files of the split {split}; expected {accepted}, "
            f"or a folder of that name; it holds {listing(names)}."
        )
    numbered = [path for path in found if "-of-" in path.stem]
    if numbered:
        total = int(numbered[0].stem.rpartition("-of-")[2])
        if len(numbered) != total:
            raise ValueError(
                f"{dense.name}: {root} has {len(numbered)} Parquet files of the split {split}, "
                f"expected {total} as {numbered[0].name} says; it holds "
                f"{listing([path.name for path in found])}."
            )
    return found


def _split_of(root: Path, path: Path) -> str | None:
    folder = path.parent.name if path.parent != root else ""
    for split, spellings in _SPELLINGS.items():
        if folder in spellings or path.stem.partition("-")[0] in spellings:
            return split
    return None


def _opened(dense: DenseSet, path: Path, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{dense.name}: {name} is not a complete Parquet file ({_first_line(error)}); copy it "
            "again."
        ) from error


def _check_columns(
    dense: DenseSet, name: str, schema: pa.Schema, wanted: Mapping[str, str]
) -> None:
    for ours, theirs in wanted.items():
        if theirs not in schema.names:
            columns = ", ".join(f"{entry.name} ({entry.type})" for entry in schema)
            raise ValueError(
                f"{dense.name}: {name} has no column {theirs!r} for {ours}; its columns are "
                f"{columns}. Name the right one with data.columns, for example "
                f"{{{ours!r}: {schema.names[0]!r}}}."
            )


def _array(value: pa.Array, label: str) -> NDArray[Any]:
    """One row's numbers; nested lists of equal lengths or a tensor."""
    shape: list[int] = []
    if isinstance(value.type, pa.FixedShapeTensorType):
        shape = list(value.type.shape)
        value = value.storage.flatten()
    elif isinstance(value, pa.ExtensionArray):
        value = value.storage
    while _is_list(value.type):
        lengths = pc.unique(pc.list_value_length(value)).to_pylist()
        if value.null_count or len(lengths) != 1:
            found = "empty" if value.null_count or not len(lengths) else "ragged"
            raise ValueError(f"{label} is {found}; expected nested lists of equal lengths.")
        shape.append(lengths[0])
        value = value.flatten()
    if value.null_count:
        raise ValueError(f"{label} is empty in {value.null_count} places; expected numbers.")
    if not (pa.types.is_integer(value.type) or pa.types.is_floating(value.type)):
        raise ValueError(
            f"{label} holds {value.type}, expected nested lists or tensors of numbers."
        )
    return value.to_numpy(zero_copy_only=False).reshape(shape)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


class _Place:
    """Where a process stands in a row group."""

    def __init__(self, path: Path, group: int, columns: tuple[str, ...]) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self._batches: Iterator[pa.RecordBatch] = self._file.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=list(columns)
        )
        self._batch: pa.RecordBatch | None = None
        self._first = 0

    def can_reach(self, row: int) -> bool:
        return row >= self._first

    def row(self, row: int) -> dict[str, pa.Array]:
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches)
        return {
            name: self._batch.column(name).slice(row - self._first, 1)
            for name in self._batch.schema.names
        }


_places: OrderedDict[tuple[int, str, int, tuple[str, ...]], _Place] = OrderedDict()
"""By process (a fork must not share a position in a file), file, row group and columns."""


def _row(path: Path, group: int, row: int, columns: tuple[str, ...]) -> dict[str, pa.Array]:
    key = (os.getpid(), str(path), group, columns)
    place = _places.pop(key, None)
    if place is None or not place.can_reach(row):
        place = _Place(path, group, columns)
    values = place.row(row)
    _places[key] = place
    while len(_places) > _PLACES_KEPT:
        _places.popitem(last=False)
    return values


def _forget(path: Path) -> None:
    for key in [key for key in _places if key[1] == str(path)]:
        del _places[key]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
