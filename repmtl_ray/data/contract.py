"""Whether samples keep the column contract: every violation, not only the first.

Owns the checks of `columns` and `stream.Kind` on arrays of any origin, and counting what the arrays
hold. Reads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE
from repmtl_ray.data.stream import Kind

RANGE_TOLERANCE = 1e-3
"""How far resampling may carry a float image out of 0..1, and a normal's length off 1."""
COLOURS = (
    "If colours code the normals, decode them: 2 * value - 1 for 0 to 1, value / 127.5 - 1 for 0 to "
    "255."
)
"""What an error about normals says of the usual cause."""
_LENGTH_TOLERANCE = 1e-2
_SHAPES: dict[Kind, str] = {
    "image": "[height, width, 3]",
    "label": "[height, width]",
    "depth": "[height, width, 1]",
    "inverse_depth": "[height, width, 1]",
    "normal": "[height, width, 3]",
    "class": "a single number",
}
_DTYPES: dict[Kind, str] = {
    "image": "uint8 or float32",
    "label": "integers",
    "class": "integers",
    "depth": "float32",
    "inverse_depth": "float32",
    "normal": "float32",
}


def problems(
    sample: Mapping[str, NDArray[Any]],
    kinds: Mapping[str, Kind],
    num_classes: Mapping[str, int] | None = None,
) -> list[str]:
    """Everything that is wrong with a sample; each begins with the column's name.

    Args:
        sample: by column.
        kinds: of its targets, by task; the image needs no mention.
        num_classes: of label and class columns, where known.

    Returns:
        Nothing, if it keeps the contract.
    """
    found: list[str] = []
    for name, kind in {IMAGE: "image", **kinds}.items():
        if name not in sample:
            found.append(f"{name}: missing; there are {', '.join(sorted(sample))}")
            continue
        values = np.asarray(sample[name])
        wrong = _form(values, kind)
        if not wrong:
            classes = (num_classes or {}).get(name)
            wrong = _content(values, kind, classes)
        found += [f"{name}: {text}" for text in wrong]
    if not found:
        size = np.shape(sample[IMAGE])[:2]
        found = [
            f"{name}: is {' x '.join(map(str, np.shape(sample[name])[:2]))}, the image is "
            f"{' x '.join(map(str, size))}"
            for name, kind in kinds.items()
            if kind != "class" and np.shape(sample[name])[:2] != size
        ]
    return found


def _form(values: NDArray[Any], kind: Kind) -> list[str]:
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


def _content(values: NDArray[Any], kind: Kind, num_classes: int | None) -> list[str]:
    if values.dtype.kind == "f":
        strange = int(np.count_nonzero(~np.isfinite(values)))
        if strange:
            return [f"has {strange} values that are NaN or infinite"]
    low, high = values.min(), values.max()
    if kind == "image" and values.dtype.kind == "f":
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            return [f"has values from {low:g} to {high:g}, expected 0 to 1 (or uint8)"]
    elif kind in ("label", "class"):
        top = "" if num_classes is None else f" to {num_classes - 1}"
        if low < IGNORE_LABEL or (num_classes is not None and high >= num_classes):
            return [f"has labels from {low} to {high}, expected 0{top}, or -1 to ignore"]
    elif kind in ("depth", "inverse_depth"):
        if low < 0:
            return [f"has negative values, down to {low:g}, expected 0 where invalid"]
    elif kind == "normal":
        length = np.linalg.norm(values, axis=2)
        off = int(np.count_nonzero((length > 0) & (np.abs(length - 1) > _LENGTH_TOLERANCE)))
        if off:
            return [f"has {off} vectors whose length is neither 1 nor 0. {COLOURS}"]
        if not length.any():
            return ["is zero everywhere: no pixel has a normal"]
    return []


def is_labelled(values: NDArray[Any], kind: Kind) -> bool:
    """Whether any value of a target is one that losses read.

    Args:
        values: of one sample, or of several along a first axis.
        kind: of the target.
    """
    if kind in ("label", "class"):
        return bool((values != IGNORE_LABEL).any())
    return bool(values.any())


@dataclass
class Contents:
    """What columns hold, added up over samples.

    Args:
        classes: by label or class column, how often each value was seen.
        valid, total: by target, values that losses read, and all.
    """

    classes: dict[str, Counter[int]] = field(default_factory=dict)
    valid: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Mapping[str, NDArray[Any]], kinds: Mapping[str, Kind]) -> None:
        for name, kind in kinds.items():
            values = np.asarray(sample[name])
            if kind in ("label", "class"):
                found, counts = np.unique(values, return_counts=True)
                self.classes.setdefault(name, Counter()).update(
                    dict(zip(found.tolist(), counts.tolist(), strict=True))
                )
                valid = values != IGNORE_LABEL
            else:
                valid = values.any(axis=2)
            self.valid[name] += int(np.count_nonzero(valid))
            self.total[name] += int(np.size(valid))

    def merge(self, others: Iterable[Contents]) -> Contents:
        """This, with the others' counts added."""
        for other in others:
            for name, counts in other.classes.items():
                self.classes.setdefault(name, Counter()).update(counts)
            self.valid.update(other.valid)
            self.total.update(other.total)
        return self
