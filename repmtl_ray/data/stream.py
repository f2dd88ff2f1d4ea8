"""What a source is, seen from the rest: one or more streams, which are datasets of numbered samples.

Owns the `Stream` class, the kinds of columns, checksums of samples, and the part of a training split
that is held out; no reading: `sources` makes streams.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.columns import IMAGE, SAMPLE_ID

if TYPE_CHECKING:  # processes that only read samples never load torch
    from torch import Tensor

Kind = Literal[
    "image", "label", "depth", "inverse_depth", "normal", "class", "value", "binary", "input"
]
"""How a column is stored, augmented and batched. As stored:

image          [H, W, 3], uint8 in 0..255 or float32 in 0..1
label          [H, W] integers, a class for every pixel, -1 to ignore
depth          [H, W, 1] float32, metres, 0 where invalid
inverse_depth  [H, W, 1] float32, anything proportional to 1 / metres, 0 where invalid
normal         [H, W, 3] float32 unit vectors, zero where invalid
class          integer scalar, a class for the whole sample, -1 to ignore
value          float scalar or [K] floats, NaN where not known
binary         integer scalar or [K] integers, 0 or 1, -1 where not known
input          numbers of any shape that an encoder of the user's own takes; finite
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
        reload: the same as `load`, for samples that were loaded before, in whatever process; may
            leave out checks. None: `load` itself.
        image_size: (height, width) of every image; None where that is not known before one is read.
        inputs: the columns that the encoder takes.
        make_inputs: turns stacked columns, without the image, into what the encoder takes; None
            takes every column as it is.
    """

    name: str
    kinds: Mapping[str, Kind]
    num_samples: int
    load: Callable[[int], Sample]
    normalize: Normalization | None = None
    classes: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    reload: Callable[[int], Sample] | None = None
    image_size: tuple[int, int] | None = None
    inputs: tuple[str, ...] = (IMAGE,)
    make_inputs: Callable[[Mapping[str, NDArray[Any]]], Mapping[str, Tensor]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.kinds)


class MissingSplitError(ValueError):
    """The data have no such split; nothing is wrong with those that they have."""


def contents_of(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.uint32]:
    """A checksum of each sample's columns."""
    contents = np.zeros(len(columns[SAMPLE_ID]), dtype=np.uint32)
    for name, values in sorted(columns.items()):
        for row, value in enumerate(values):
            contents[row] = zlib.crc32(
                np.ascontiguousarray(value).tobytes(),
                zlib.crc32(f"{name} {value.dtype} {value.shape}".encode(), int(contents[row])),
            )
    return contents


def fingerprint_of(contents: Mapping[str, NDArray[np.uint32]]) -> str:
    """What samples are known by: one checksum of all of them, by stream `contents_of`."""
    sums = [(name, zlib.crc32(part.tobytes())) for name, part in sorted(contents.items())]
    return f"{zlib.crc32(repr(sums).encode()):08x}"


def check_one_size(splits: Mapping[str, Sequence[Stream]]) -> None:
    """Refuses splits whose images have several sizes: a network is built and judged at one.

    Args:
        splits: by name, their streams; those that do not know their size are not looked at.

    Raises:
        ValueError: with every size, and where it was found first.
    """
    first_of: dict[tuple[int, int], str] = {}
    for split, streams in splits.items():
        for stream in streams:
            if stream.image_size is not None:
                first_of.setdefault(stream.image_size, f"{split}/{stream.name}")
    if len(first_of) > 1:
        sizes = ", ".join(
            f"{height} x {width} in {where}" for (height, width), where in first_of.items()
        )
        raise ValueError(
            f"the images have several sizes: {sizes}; a network is trained and evaluated at one "
            "size: set data.height and data.width, or prepare the data again in one size."
        )


def hold_out(
    streams: Sequence[Stream], is_held_out: bool, *, fraction: float, seed: int
) -> tuple[Stream, ...]:
    """One of the two parts of every stream.

    Args:
        streams: of the training split.
        is_held_out: whether to take the part that is cut off, or else the rest.
        fraction: of each stream's samples that are cut off, rounded, at least one.
        seed: with the stream's name and size, decides which; by chance, not by class.

    Returns:
        Streams whose samples are numbered anew, in their old order.

    Raises:
        ValueError: a stream of which nothing would be left.
    """
    parts = []
    for stream in streams:
        size = max(1, round(fraction * stream.num_samples))
        if size >= stream.num_samples:
            raise ValueError(
                f"data.holdout is {fraction}: of the {stream.num_samples} training samples of "
                f"{stream.name} nothing would be left; take a smaller fraction."
            )
        rng = np.random.default_rng([seed, zlib.crc32(stream.name.encode())])
        order = rng.permutation(stream.num_samples)
        numbers = tuple(sorted((order[:size] if is_held_out else order[size:]).tolist()))
        classes = stream.classes
        parts.append(
            dataclasses.replace(
                stream,
                num_samples=len(numbers),
                load=Subset(stream.load, numbers),
                classes=None if classes is None else tuple(classes[n] for n in numbers),
            )
        )
    return tuple(parts)


@dataclass(frozen=True)
class Subset:
    """Loads some of a stream's samples, under new numbers from 0.

    Args:
        load: of the whole stream.
        numbers: of the samples, in the whole stream.
    """

    load: Callable[[int], Sample]
    numbers: tuple[int, ...]

    def __call__(self, index: int) -> Sample:
        sample = dict(self.load(self.numbers[index]))
        sample[SAMPLE_ID] = np.array(index, dtype=np.int64)
        return sample
