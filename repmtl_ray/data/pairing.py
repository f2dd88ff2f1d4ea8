"""Rows of the same class across streams, so that "the same sample" means something in Office.

Owns the order of samples under `data.pairing` "class"; the order of "position" is in `batches`.

Source: Rep-MTL, arXiv:2507.21049, compares task saliencies of the same sample and does not say what
that is where every task sees other images. This pairing is this project's own option.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.stream import Stream

Indices = NDArray[np.int64]


def check_pairable(streams: Sequence[Stream]) -> None:
    """Refuses streams whose rows cannot be paired by class.

    Raises:
        ValueError: a stream that does not know its classes, or lacks one of the longest stream's.
    """
    longest = max(streams, key=lambda stream: stream.num_samples)
    needed = set(_classes(longest).tolist())
    for stream in streams:
        lacking = sorted(needed - set(_classes(stream).tolist()))
        if lacking:
            raise ValueError(
                f"data.pairing is 'class', but {stream.name} has no training sample of class "
                f"{', '.join(map(str, lacking[:8]))}, of which {longest.name} has; take 'position'."
            )


def class_aligned(
    streams: Sequence[Stream], anchor: Indices, *, seed: int, epoch: int
) -> Mapping[str, tuple[Indices, Indices]]:
    """An epoch's order of every stream, with one class a row.

    The longest stream keeps its own order and decides every row's class. In each other stream, the
    samples of a class come in a random order, and again in another one when they are used up; so
    the samples of a class are used equally often, give or take one.

    Args:
        streams: all of the training split; `check_pairable`.
        anchor: [rows], the samples of the longest stream (the first of several).
        seed, epoch: with stream and class, all that decides the other orders.

    Returns:
        By stream: the samples [rows], and how often each sample's class was used up before [rows].
    """
    longest = max(streams, key=lambda stream: stream.num_samples)
    wanted = _classes(longest)[anchor]
    aligned = {longest.name: (anchor, np.zeros(len(anchor), dtype=np.int64))}
    for stream in streams:
        if stream is longest:
            continue
        classes, key = _classes(stream), zlib.crc32(stream.name.encode())
        indices = np.empty(len(anchor), dtype=np.int64)
        laps = np.empty(len(anchor), dtype=np.int64)
        for label in np.unique(wanted).tolist():
            rows, samples = np.flatnonzero(wanted == label), np.flatnonzero(classes == label)
            num_laps = -(-len(rows) // len(samples))
            orders = [
                np.random.default_rng([seed, epoch, lap, key, label]).permutation(samples)
                for lap in range(num_laps)
            ]
            indices[rows] = np.concatenate(orders)[: len(rows)]
            laps[rows] = np.arange(len(rows)) // len(samples)
        aligned[stream.name] = (indices, laps)
    return aligned


def _classes(stream: Stream) -> NDArray[np.int64]:
    if stream.classes is None:
        raise ValueError(
            f"data.pairing is 'class', but {stream.name} does not know its samples' classes before "
            "they are read; take 'position'."
        )
    return np.array(stream.classes, dtype=np.int64)
