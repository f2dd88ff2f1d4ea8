"""The one validator of samples: whether arrays of any origin hold what their kind promises.

Owns the rules of `columns` and `stream.Kind` on the content of arrays, and counting what the arrays
hold. Reads nothing. Stored arrays are checked before they are converted (`dense`), finished samples
are checked as they are (`prepare`, `custom`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE
from repmtl_ray.data.stream import Kind

COLOURS = (
    " (if colours code the normals, decode them: 2 * value - 1 for 0 to 1, value / 127.5 - 1 for 0 "
    "to 255)"
)
"""What an error about normals says of the usual cause."""
SHORTEST_NORMAL = 1e-3
"""Length of a stored normal; below, it is invalid."""
_RANGE_TOLERANCE = 1e-3
"""How far resampling may carry a float image out of 0..1."""
_UNITS: Mapping[Kind, tuple[float, str]] = {
    "depth": (100.0, "metres, at most 100 (millimetres divided by 1000)"),
    "inverse_depth": (1.0, "inverse depth, at most 1 (the 16-bit disparity divided by 65535)"),
}
"""Of stored depth: the largest value, and what messages say of it."""
_LENGTH_TOLERANCE = 1e-2
_STORED_LENGTH_TOLERANCE = 0.1
_MAX_SHARE_LONG = 0.01
"""Of stored normals: resampling makes those between two surfaces short, and none long."""
_MAX_SHARE_OFF = 0.5
_SHAPES: dict[Kind, str] = {
    "image": "[height, width, 3]",
    "label": "[height, width]",
    "depth": "[height, width, 1]",
    "inverse_depth": "[height, width, 1]",
    "normal": "[height, width, 3]",
    "class": "a single number",
    "value": "a single number, or the same number of them in every sample",
    "binary": "a single 0, 1 or -1, or the same number of them in every sample",
    "input": "numbers",
}
_DTYPES: dict[Kind, str] = {
    "image": "uint8 or float32",
    "label": "integers",
    "class": "integers",
    "depth": "float32",
    "inverse_depth": "float32",
    "normal": "float32",
    "value": "float32 or float64",
    "binary": "integers",
    "input": "numbers or truth values",
}


_SPATIAL = ("label", "depth", "inverse_depth", "normal")


def sample_problems(
    sample: Mapping[str, NDArray[Any]],
    kinds: Mapping[str, Kind],
    num_classes: Mapping[str, int] | None = None,
    inputs: Sequence[str] = (IMAGE,),
) -> list[str]:
    """Everything that is wrong with a finished sample; each problem begins with the column's name.

    Args:
        sample: by column.
        kinds: of its targets, by task; the inputs need no mention.
        num_classes: of label and class columns, where known; of columns with several values, how
            many a sample has.
        inputs: the columns that the encoder takes.

    Returns:
        Nothing, if the sample is as `Kind` says.
    """
    problems: list[str] = []
    of_inputs: dict[str, Kind] = {n: "image" if n == IMAGE else "input" for n in inputs}
    for name, kind in {**of_inputs, **kinds}.items():
        if name not in sample:
            problems.append(f"{name}: missing; there are {', '.join(sorted(sample))}")
            continue
        values = np.asarray(sample[name])
        number = (num_classes or {}).get(name)
        wrong = _form_problems(values, kind, number)
        if not wrong:
            wrong = content_problems(values, kind, num_classes=number)
        problems += [f"{name}: {problem}" for problem in wrong]
    if not problems and IMAGE in inputs:
        size = np.shape(sample[IMAGE])[:2]
        problems = [
            f"{name}: is {' x '.join(map(str, np.shape(sample[name])[:2]))}, the image is "
            f"{' x '.join(map(str, size))}"
            for name, kind in kinds.items()
            if kind in _SPATIAL and np.shape(sample[name])[:2] != size
        ]
    return problems


def content_problems(
    values: NDArray[Any], kind: Kind, *, num_classes: int | None = None, is_stored: bool = False
) -> list[str]:
    """What is wrong with the numbers of an array of the right shape.

    Args:
        values: channels last, or without channels.
        kind: what they mean.
        num_classes: of labels and classes, where known.
        is_stored: they come from a file and are converted afterwards: any numeric dtype is allowed,
            normals may be short where they were resampled, and depth has a limit that shows wrong
            units.

    Returns:
        One problem, or nothing.
    """
    if kind == "value":
        num_strange = int(np.count_nonzero(np.isinf(values)))
        return [f"has {num_strange} infinite values; NaN says unknown"] if num_strange else []
    if values.dtype.kind == "f":
        num_strange = int(np.count_nonzero(~np.isfinite(values)))
        if num_strange:
            return [f"has {num_strange} values that are NaN or infinite"]
    if kind == "input":
        return []
    if kind == "image":
        return _image_problems(values)
    if kind == "binary":
        return _label_problems(values, 2)
    if kind in ("label", "class"):
        return _label_problems(values, num_classes)
    if kind == "normal":
        return _stored_normal_problems(values) if is_stored else _normal_problems(values)
    return _depth_problems(values, kind, is_stored)


def _form_problems(values: NDArray[Any], kind: Kind, number: int | None) -> list[str]:
    if kind in ("value", "binary", "input"):
        return _vector_problems(values, kind, number)
    wrong = []
    channels = {"image": 3, "normal": 3, "depth": 1, "inverse_depth": 1}.get(kind)
    dimensions = {"class": 0, "label": 2}.get(kind, 3)
    if values.ndim != dimensions or (channels and values.shape[2] != channels) or not values.size:
        wrong.append(f"has shape {values.shape}, expected {_SHAPES[kind]}")
    if kind in ("label", "class"):
        right = values.dtype.kind in "ui"
    else:
        right = values.dtype == np.float32 or (kind == "image" and values.dtype == np.uint8)
    if not right:
        wrong.append(f"has dtype {values.dtype}, expected {_DTYPES[kind]}")
    return wrong


def _vector_problems(values: NDArray[Any], kind: Kind, number: int | None) -> list[str]:
    """What is wrong with the shape and the dtype of a column that is no image and no map."""
    kinds = {"value": "f", "binary": "ui", "input": "uifb"}[kind]
    wrong = []
    if number is not None:
        shapes = [(number,)] if number > 1 else [(), (1,)]
        if values.shape not in shapes:
            count = "a single number" if number == 1 else f"{number} numbers"
            wrong.append(f"has shape {values.shape}, expected {count}")
    elif not values.size:
        wrong.append(f"has shape {values.shape}, expected {_SHAPES[kind]}")
    if values.dtype.kind not in kinds or values.dtype == np.float16:
        wrong.append(f"has dtype {values.dtype}, expected {_DTYPES[kind]}")
    return wrong


def _image_problems(values: NDArray[Any]) -> list[str]:
    low, high = values.min(), values.max()
    if values.dtype.kind != "f":
        if low >= 0 and high <= 255:
            return []
        return [f"has values from {low} to {high}, expected 0 to 255 for integers"]
    if low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE:
        return []
    return [
        f"has values from {low:g} to {high:g}, expected 0 to 1 for floats; divide by 255, or save "
        "0..255 as uint8"
    ]


def _label_problems(values: NDArray[Any], num_classes: int | None) -> list[str]:
    low, high = values.min(), values.max()
    is_whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    if is_whole and low >= IGNORE_LABEL and (num_classes is None or high < num_classes):
        return []
    top = np.inf if num_classes is None else num_classes
    strange = [
        label
        for label in np.unique(values).tolist()
        if not (IGNORE_LABEL <= label < top and label == int(label))
    ]
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    expected = "0 and above" if num_classes is None else f"0 to {num_classes - 1}"
    hint = " (if 255 means ignore, save it as -1)" if 255 in strange else ""
    return [
        f"has the labels {', '.join(f'{label:g}' for label in strange[:8])}{more}; expected "
        f"{expected}, or {IGNORE_LABEL} to ignore{hint}"
    ]


def _depth_problems(values: NDArray[Any], kind: Kind, is_stored: bool) -> list[str]:
    low, high = values.min(), values.max()
    if low < 0:
        return [f"has negative values, down to {low:g}; expected 0 where invalid"]
    largest, unit = _UNITS[kind]
    if is_stored and high > largest:
        return [f"has values up to {high:g}; expected {unit}; 0 where invalid"]
    return []


def _normal_problems(values: NDArray[Any]) -> list[str]:
    length = np.linalg.norm(values, axis=2)
    num_off = int(np.count_nonzero((length > 0) & (np.abs(length - 1) > _LENGTH_TOLERANCE)))
    if num_off:
        return [f"has {num_off} vectors whose length is neither 1 nor 0{COLOURS}"]
    return [] if length.any() else ["is zero everywhere: no pixel has a normal"]


def _stored_normal_problems(values: NDArray[Any]) -> list[str]:
    expected = "expected unit vectors, zero where invalid"
    stored = values.astype(np.float32, copy=False)
    low, high = stored.min(), stored.max()
    if max(-low, high) > 1 + _LENGTH_TOLERANCE:
        return [f"has values from {low:g} to {high:g}, expected -1 to 1{COLOURS}"]
    if values.dtype.kind != "f":
        return [f"has dtype {values.dtype}, which rounds unit vectors; {expected}"]
    length = np.linalg.norm(stored, axis=2)
    length = length[length > SHORTEST_NORMAL]
    num_long = np.count_nonzero(length > 1 + _STORED_LENGTH_TOLERANCE)
    num_off = num_long + np.count_nonzero(length < 1 - _STORED_LENGTH_TOLERANCE)
    if num_long > _MAX_SHARE_LONG * length.size or num_off > _MAX_SHARE_OFF * length.size:
        return [
            f"has {num_off} of {length.size} vectors whose length is not 1 (from {length.min():g} to "
            f"{length.max():g}); {expected}{COLOURS}"
        ]
    return [] if length.size else [f"is zero everywhere, as if no normal were valid; {expected}"]


def is_labelled(values: NDArray[Any], kind: Kind) -> bool:
    """Whether any value of a target is one that losses read.

    Args:
        values: of one sample, or of several along a first axis.
        kind: of the target.
    """
    if kind in ("label", "class", "binary"):
        return bool((values != IGNORE_LABEL).any())
    if kind == "value":
        return bool(np.isfinite(values).any())
    return bool(values.any())


def answers_in(
    columns: Mapping[str, NDArray[Any]], kinds: Mapping[str, Kind]
) -> dict[str, NDArray[np.bool_]]:
    """By yes-or-no task, [labels, 2]: whether any row has a 0, and whether any has a 1.

    Args:
        columns: stacked samples; columns that are missing are passed over.
        kinds: of the targets, by task.
    """
    answers = {}
    for name, kind in kinds.items():
        if kind == "binary" and name in columns:
            rows = columns[name].reshape(len(columns[name]), -1)
            answers[name] = np.stack([(rows == answer).any(axis=0) for answer in (0, 1)], axis=1)
    return answers


def no_label(split: str, task: str, num_samples: int) -> str:
    """What to say of a split in which a task has no label."""
    return (
        f"{split}: task {task!r} has no valid label in any of its {num_samples} samples: every value is "
        "the one that is ignored (class -1, depth 0, normal 0). Correct the labels, or leave the task "
        "out (`tasks`)."
    )


@dataclass
class Contents:
    """What columns hold, added up over samples.

    Args:
        classes: by label or class column, how often each value was seen; values are written as
            JSON's names are, "-1".
        valid, total: by target, values that losses read, and all.
    """

    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    valid: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def add(self, sample: Mapping[str, NDArray[Any]], kinds: Mapping[str, Kind]) -> None:
        for name, kind in kinds.items():
            values = np.asarray(sample[name])
            if kind in ("label", "class"):
                labels, counts = np.unique(values, return_counts=True)
                seen = dict(zip(map(str, labels.tolist()), counts.tolist(), strict=True))
                _add_counts(self.classes.setdefault(name, {}), seen)
                valid = values != IGNORE_LABEL
            else:
                valid = values.any(axis=2)
            _add_counts(self.valid, {name: int(np.count_nonzero(valid))})
            _add_counts(self.total, {name: int(np.size(valid))})

    def merge(self, others: Iterable[Contents]) -> Contents:
        """This, with the others' counts added."""
        for other in others:
            for name, counts in other.classes.items():
                _add_counts(self.classes.setdefault(name, {}), counts)
            _add_counts(self.valid, other.valid)
            _add_counts(self.total, other.total)
        return self


def _add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number
