"""Dense data in Parquet files, as data hubs mirror them: one row a frame, one column a target.

Owns finding the files of a split, their schema and reading rows; content is checked in `dense`.

    data/<split>-00000-of-00008.parquet, ... or <split>/*.parquet, or the files themselves in the
        folder, or one folder deeper: default/<split>/0000.parquet, ... as the hub converts data
        (default/partial-<split>/ where it stopped after the first rows, which a note says);
        the splits are train and val (or validation), or test
    image         [3, H, W] or [H, W, 3] nested lists or tensors; floats in 0..1, or 0..255
    segmentation  [H, W]                 depth [1, H, W], [H, W, 1] or [H, W]
    normal        [3, H, W] or [H, W, 3] (nyuv2 only); other columns are not read

Rows are decoded one after the other, not by whole row groups, which hold hundreds of megabytes in
the published mirrors: a process keeps its place in the row groups that it reads, so that reading
upwards decodes everything once.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from repmtl_ray.data import arrow_arrays
from repmtl_ray.data.dense import DenseSet, Shape
from repmtl_ray.data.files import compare_splits, listing, visible_below
from repmtl_ray.data.stream import MissingSplitError

_SPLIT_OF = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""By how hubs spell it in a folder's or a file's name."""
_PARTIAL = "partial-"  # begins a folder's name where the hub converted only the first rows
_PATTERNS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
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
            values, schema = _row(path, group, row, tuple(self.columns.values()))
        except (OSError, pa.ArrowException) as error:
            _forget(path)
            raise ValueError(
                f"{self.dataset}: {self.files[file]} row {self._row_in_file(frame)} cannot be read "
                f"({_first_line(error)}); copy the file again."
            ) from error
        return {
            ours: arrow_arrays.to_numpy(
                values[theirs], schema.field(theirs), f"{self.dataset}: {self.where(frame, ours)}"
            )
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
        parquet_file = _opened(dense, path, name)
        schema, metadata = parquet_file.schema_arrow, parquet_file.metadata
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
    return replace(frames, shapes=shapes, notes=_notes(dense, root, split, files))


def _notes(dense: DenseSet, root: Path, split: str, files: Sequence[Path]) -> tuple[str, ...]:
    by_split: dict[str, list[str]] = {}
    for file in _listed(root):
        by_split.setdefault(file.split, []).append(file.path.relative_to(root).as_posix())
    notes = compare_splits(dense.name, root, by_split)
    folder = files[0].parent.name
    if not folder.startswith(_PARTIAL):
        return notes
    return (
        f"{dense.name}: the split {split} is incomplete: {folder} holds only its first rows, which "
        "the hub converted; metrics cannot be compared with those of the whole split.",
        *notes,
    )


def is_mirror(root: Path) -> bool:
    """Whether a folder holds Parquet files where mirrors have them."""
    return bool(_listed(root))


def _wanted(dense: DenseSet, columns: Mapping[str, str]) -> dict[str, str]:
    for ours in columns:
        if ours not in dense.columns:
            raise ValueError(
                f"data.columns has {ours!r}, which is no column of {dense.name}; it has "
                f"{', '.join(dense.columns)}."
            )
    return {ours: columns.get(ours, ours) for ours in dense.columns}


class _Found(NamedTuple):
    """A Parquet file and what its name says.

    Attributes:
        path: of the file.
        config: folder that holds the files of all splits, relative to the root; "" for the root.
        split: "train", "val" or "test".
        group: the name without numbers; the files of one split have one.
        number, total: of the file among those of its split, where the name gives them.
    """

    path: Path
    config: str
    split: str
    group: str
    number: int | None
    total: int | None


def _listed(root: Path) -> list[_Found]:
    """The files of all splits, by folder and name; hidden files and folders are left out."""
    files = (_named(root, path) for path in visible_below(root, *_PATTERNS))
    return [file for file in files if file is not None]


def _named(root: Path, path: Path) -> _Found | None:
    *folders, _ = path.relative_to(root).parts
    spelling = folders[-1].removeprefix(_PARTIAL) if folders else ""
    in_folder = spelling in _SPLIT_OF
    if not in_folder:
        spelling = path.stem.partition("-")[0]
    if spelling not in _SPLIT_OF:
        return None
    of_total = re.search(r"(\d+)-of-(\d+)", path.stem)
    alone = re.fullmatch(rf"(?:{spelling}-)?(\d+)", path.stem)
    number = of_total or alone
    start = number.start(1) if number else len(spelling) if not in_folder else 0
    return _Found(
        path=path,
        config="/".join(folders[:-1] if in_folder else folders),
        split=_SPLIT_OF[spelling],
        group="/".join([*folders, path.stem[:start]]),
        number=int(number[1]) if number else None,
        total=int(of_total[2]) if of_total else None,
    )


def _files(dense: DenseSet, root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{dense.name}: {root} {state}; set data.path to the Parquet files' folder."
        )
    everything = _listed(root)
    configs = sorted({file.config for file in everything})
    if len(configs) > 1:
        names = [config or "the folder itself" for config in configs]
        raise ValueError(
            f"{dense.name}: {root} holds {len(configs)} configurations side by side: "
            f"{listing(names)}; set data.path to the folder of one of them."
        )
    files = [file for file in everything if file.split == split]
    if not files:
        names = [path.relative_to(root).as_posix() for path in visible_below(root, "**/*.parquet")]
        spellings = [name for name, of in _SPLIT_OF.items() if of == split]
        accepted = " or ".join(f"{name}-*.parquet" for name in spellings)
        raise MissingSplitError(
            f"{dense.name}: {root} has no Parquet files of the split {split}; expected {accepted}, "
            f"or a folder of that name; it holds {listing(names)}."
        )
    problem = _numbering_problem(files)
    if problem:
        names = [file.path.relative_to(root).as_posix() for file in files]
        raise ValueError(
            f"{dense.name}: the Parquet files of the split {split} in {root} are not one complete "
            f"set: {problem}; there are {listing(names)}. Copy what is missing, and remove what "
            "is of another set."
        )
    return [file.path for file in sorted(files, key=lambda file: (file.number or 0, file.path))]


def _numbering_problem(files: Sequence[_Found]) -> str:
    """What the names of one split's files contradict; "" if nothing."""
    groups = sorted({file.group for file in files})
    if len(groups) > 1:
        return f"{' and '.join(f'{group}*' for group in groups)} are several sets"
    names: dict[int, str] = {}
    for file in files:
        if file.number is not None:
            if file.number in names:
                return f"{names[file.number]} and {file.path.name} have the same number"
            names[file.number] = file.path.name
    first = files[0]
    if names and len(names) < len(files):
        return "only some of the names have a number"
    totals = sorted({-1 if file.total is None else file.total for file in files})
    if len(totals) > 1:
        shown = ["no total" if total == -1 else str(total) for total in totals]
        return f"their names give {' and '.join(shown)} as the number of files"
    is_series = len(files) > 1 or first.path.stem.isdigit()
    num_files = first.total if first.total is not None else len(files)
    if first.total is None and not (names and is_series):
        return ""
    missing = sorted(set(range(num_files)) - names.keys())
    if missing:
        digits = len(re.findall(r"(\d+)(?:-of-|$)", first.path.stem)[0])
        which = ", ".join(f"{number:0{digits}}" for number in missing[:8])
        return (
            f"number {which} of {num_files} is missing (numbers begin with 0), as "
            f"{first.path.name} says"
        )
    if len(names) > num_files:
        return f"{names[max(names)]} is beyond the last number, {num_files - 1}"
    return ""


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

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

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


def _row(
    path: Path, group: int, row: int, columns: tuple[str, ...]
) -> tuple[dict[str, pa.Array], pa.Schema]:
    key = (os.getpid(), str(path), group, columns)
    place = _places.pop(key, None)
    if place is None or not place.can_reach(row):
        place = _Place(path, group, columns)
    values = place.row(row)
    _places[key] = place
    while len(_places) > _PLACES_KEPT:
        _places.popitem(last=False)
    return values, place.schema


def _forget(path: Path) -> None:
    for key in [key for key in _places if key[1] == str(path)]:
        del _places[key]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
