"""A validation part cut from the training split, by seed: what an epoch may be chosen on.

Owns the cut of streams in two. The official validation and test splits are left alone.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.stream import Sample, Stream


def cut(
    streams: Sequence[Stream], held_out: bool, *, fraction: float, seed: int
) -> tuple[Stream, ...]:
    """One of the two parts of every stream.

    Args:
        streams: of the training split.
        held_out: the part that is cut off, or else the rest.
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
        numbers = tuple(sorted((order[:size] if held_out else order[size:]).tolist()))
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
