"""What a source is, seen from the rest: one or more streams of numbered samples.

Owns the `Stream` class and the kinds of columns, and no reading; `sources` makes streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from numpy.typing import NDArray

Kind = Literal["image", "label", "depth", "inverse_depth", "normal", "class"]
"""How a column is stored, augmented and batched. As stored:

image          [H, W, 3], uint8 in 0..255 or float32 in 0..1
label          [H, W] integers, a class for every pixel, -1 to ignore
depth          [H, W, 1] float32, metres, 0 where invalid
inverse_depth  [H, W, 1] float32, anything proportional to 1 / metres, 0 where invalid
normal         [H, W, 3] float32 unit vectors, zero where invalid
class          integer scalar, a class for the whole image, -1 to ignore
"""

Sample: TypeAlias = dict[str, NDArray[Any]]
"""By column: `sample_id` (int64 scalar), `image`, and one target for every task of its stream."""


class Normalization(NamedTuple):
    """What a network was trained to see: (image - mean) / std, by channel, for an image in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Numbered samples that carry the same targets; picklable, so that any process can read it.

    Args:
        name: unique among the streams of a split; part of the seeds of order and augmentation.
        kinds: of its targets, by task.
        num_samples: how many; they are numbered from 0, and `sample_id` is that number.
        load: reads one sample and checks its content; ValueError if it is not as it should be.
        normalize: done to images when they are batched; None leaves them in 0..1.
        classes: [num_samples], of whole images, where the listing tells them; None otherwise.
        notes: what a reader of results must know of these samples, one sentence each; for example,
            that a target is an estimate.
    """

    name: str
    kinds: Mapping[str, Kind]
    num_samples: int
    load: Callable[[int], Sample]
    normalize: Normalization | None = None
    classes: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.kinds)
