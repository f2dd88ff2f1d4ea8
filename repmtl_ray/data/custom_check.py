"""Blocks of the user's own rows: one form, and what is wrong with them, every kind of fault once.

Owns the form and the check of a block, the message that is made of all blocks' reports, and that of
an error in the rows' own functions. What a single sample must hold is in `validation`; the user's
data sets are opened in `custom`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow
import ray
from numpy.typing import NDArray
from ray.data.extensions import ArrowTensorArray

from repmtl_ray.data import validation
from repmtl_ray.data.arrow_arrays import array_of_lists
from repmtl_ray.data.blocks import Summary, views_of
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.stream import Kind, contents_of

_SHOWN = 5
NO_INPUT = "fill in a number, or leave the row out: inputs have no value that is ignored"
NO_VALUE = "give a sample without a label the ignore value everywhere (-1, depth 0, normal 0)"


@dataclass(frozen=True)
class Report:
    """What one block holds: problems as (sample_id, text), with None where a problem is not one
    sample's; by column, how often each form came."""

    summary: Summary
    problems: list[tuple[int | None, str]]
    forms: dict[str, Counter[str]] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    num_bytes: int = 0


@dataclass(frozen=True)
class BlockCheck:
    """Checks every sample of a block."""

    kinds: Mapping[str, Kind]
    num_classes: Mapping[str, int]
    inputs: tuple[str, ...] = (IMAGE,)
    has_collate: bool = False

    def __call__(self, table: Any) -> Report:
        empty = {name: table.column(name).is_null().to_pylist() for name in table.column_names}
        empty = {name: rows for name, rows in empty.items() if any(rows)}
        columns = views_of(table.drop_columns(list(empty))) if table.num_rows else {}
        count = table.num_rows
        ids = np.asarray(columns.get(SAMPLE_ID, np.arange(count)))
        problems: list[tuple[int | None, str]] = []
        wrong = _wrong_ids(ids)
        if wrong:
            problems = [(None, f"{SAMPLE_ID}: {wrong}")]
            ids = np.arange(count)
        ids = ids.astype(np.int64)
        one_form = () if self.has_collate else self.inputs
        one_form = (*one_form, *([IMAGE] if IMAGE in self.inputs else []))
        forms: dict[str, Counter[str]] = {name: Counter() for name in (*one_form, *self.kinds)}
        size = None
        for name, is_empty in empty.items():
            why = "it decides the sample's order and view" if name == SAMPLE_ID else NO_VALUE
            why = NO_INPUT if name in self.inputs else why
            text = f"{name}: has no value (None); {why}"
            numbered: list[int | None] = [None] * count if name == SAMPLE_ID else ids.tolist()
            problems += [(numbered[row], text) for row in range(count) if is_empty[row]]
        lacks_input = any(name in empty for name in self.inputs)
        is_right = self._is_plainly_right(columns, empty)
        for name in one_form if is_right else ():  # the network would see one type or another
            forms[name][f"{columns[name].dtype} {columns[name].shape[1:]}"] += count
        for row in range(0 if is_right else count):
            sample = {name: np.asarray(values[row]) for name, values in columns.items()}
            kinds = {name: kind for name, kind in self.kinds.items() if name not in empty}
            sample_problems = (
                []
                if lacks_input
                else validation.sample_problems(sample, kinds, self.num_classes, self.inputs)
            )
            problems += [(int(ids[row]), text) for text in sample_problems]
            for name, counts in forms.items():
                if name in sample:
                    counts[f"{sample[name].dtype} {sample[name].shape}"] += 1
            if not sample_problems and IMAGE in sample:
                size = sample[IMAGE].shape[0], sample[IMAGE].shape[1]
        if problems or SAMPLE_ID not in columns:
            summary = Summary(ids, np.zeros(count, dtype=np.uint32), [])
        else:
            has_label = [validation.is_labelled(columns[n], kind) for n, kind in self.kinds.items()]
            labelled = frozenset(itertools.compress(self.kinds, has_label))
            answers = validation.answers_in(columns, self.kinds)
            extremes = {
                name: found
                for name in self.inputs
                if name != IMAGE and (found := _extremes(columns[name], ids)) is not None
            }
            summary = Summary(ids, contents_of(columns), [], labelled, answers, extremes)
        return Report(
            summary,
            problems,
            forms,
            size,
            sum(values.nbytes for values in columns.values()),
        )

    def _is_plainly_right(
        self, columns: Mapping[str, NDArray[Any]], empty: Collection[str]
    ) -> bool:
        """Whether a block of numbers needs no look at every row: tables have very many.

        The rows of an array have one shape and one dtype, so the first row and the content of the
        whole column tell of all of them. Images and maps are looked at one by one.
        """
        kinds = {**dict.fromkeys(self.inputs, "input"), **self.kinds}
        if empty or IMAGE in self.inputs or not kinds.keys() <= columns.keys():
            return False
        if not all(len(values) for values in columns.values()):
            return False
        if any(values.dtype.kind == "O" for values in columns.values()):
            return False
        if not set(kinds.values()) <= {"input", "class", "value", "binary"}:
            return False
        first = {name: np.asarray(values[0]) for name, values in columns.items()}
        return not validation.sample_problems(
            first, self.kinds, self.num_classes, self.inputs
        ) and not any(
            validation.content_problems(
                columns[name],
                cast(Kind, kind),
                num_classes=self.num_classes.get(name) if kind == "class" else None,
            )
            for name, kind in kinds.items()
        )


def _extremes(
    values: NDArray[Any], ids: NDArray[np.int64]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The smallest and the largest value of an input of integers, each with its sample's id; None of
    other inputs."""
    if values.dtype.kind == "O":  # of several lengths, for a `collate`
        rows = [np.asarray(row) for row in values]
        places = [n for n, row in enumerate(rows) if row.size and row.dtype.kind in "ui"]
        lows = np.array([rows[n].min() for n in places])
        highs, ids = np.array([rows[n].max() for n in places]), ids[places]
    elif values.dtype.kind in "ui" and values.size:
        flat = values.reshape(len(values), -1)
        lows, highs = flat.min(axis=1), flat.max(axis=1)
    else:
        return None
    if not len(lows):
        return None
    low, high = lows.argmin(), highs.argmax()
    return (int(lows[low]), int(ids[low])), (int(highs[high]), int(ids[high]))


def _wrong_ids(ids: NDArray[Any]) -> str:
    """What is wrong with a block's sample ids; "" if nothing."""
    if ids.dtype.kind not in "ui" or ids.ndim != 1:
        what = f"dtype {ids.dtype}" if ids.ndim == 1 else f"shape {ids.shape[1:]} in each row"
        return f"has {what}, expected integers"
    if ids.size and ids.max() > np.iinfo(np.int64).max:
        return f"has values up to {ids.max()}, expected at most {np.iinfo(np.int64).max} (int64)"
    return ""


def explained(reports: Sequence[Report], there: set[str]) -> list[str]:
    """Every kind of violation once, with how many samples have it and the first of them."""
    ids = np.concatenate([report.summary.ids for report in reports] or [np.array([])])
    if not len(ids):
        return ["has no rows; expected at least one"]
    lines = []
    if SAMPLE_ID not in there:
        have = ", ".join(sorted(there))
        lines.append(
            f"{SAMPLE_ID}: missing; expected unique integers, for example those of enumerate(rows); "
            f"there are {have}"
        )
    is_numbered = all(n is not None for report in reports for n, _ in report.problems)
    distinct_ids, counts = np.unique(ids, return_counts=True)
    if SAMPLE_ID in there and is_numbered and (counts > 1).any():
        twice = ", ".join(map(str, distinct_ids[counts > 1][:_SHOWN].tolist()))
        lines.append(f"{SAMPLE_ID}: {(counts > 1).sum()} ids come more than once: {twice}")
    groups: dict[str, list[tuple[int | None, str]]] = {}
    for report in reports:
        for sample_id, text in report.problems:
            groups.setdefault(" ".join(text.split()[:3]), []).append((sample_id, text))
    for members in groups.values():
        which = sorted({sample_id for sample_id, _ in members if sample_id is not None})
        first = next(text for sample_id, text in members if not which or sample_id == which[0])
        shown = ", ".join(map(str, which[:_SHOWN])) + (", ..." if len(which) > _SHOWN else "")
        lines.append(f"{first} ({len(which)} samples: {shown})" if which else first)
    forms: dict[str, Counter[str]] = {}
    for report in reports:
        for name, seen in report.forms.items():
            forms.setdefault(name, Counter()).update(seen)
    lines += [
        f"{name}: has several forms: {', '.join(f'{form} ({n})' for form, n in seen.most_common(3))}; expected one"
        for name, seen in forms.items()
        if len(seen) > 1
    ]
    return lines


def reason_of(error: BaseException) -> str:
    """What a Dataset's own functions raised, without Ray's wrapping, and what can be done."""
    # Ray shows the functions' own error first, and after it those that it made of it.
    text = str(error).partition("The above exception was the direct cause")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if not isinstance(error, ray.exceptions.RayError):
        lines[-1] = f"{type(error).__name__}: {lines[-1]}"
    if "both objects and tensors" in lines[-1]:
        return (
            f"some rows lack an array that others have ({lines[-1]}); give a sample without a label "
            "the ignore value everywhere (-1, depth 0, normal 0)"
        )
    return lines[-1]


def regular(
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
