"""Which sample is where in an epoch: a permutation for every stream, or rows of one class across streams.

Owns the order of samples, as a function of seed, epoch and batch size alone, and the place of a batch
in a run.

Source of `align_task_rows`: Rep-MTL, arXiv:2507.21049, compares task saliencies of the same sample and
does not say what that is where every task sees other images. To show one class in row b of every
stream (`data.pairing` "class") is this project's own option.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.stream import Stream

Indices = NDArray[np.int64]
Sampler = Callable[[int, int], tuple[Indices, Indices]]
"""(first, count) to so many samples of a stream from a place in its epoch on; and for each, how often
the stream, or the sample's class, was used up before."""


class Place(NamedTuple):
    """Where in a run a batch is: its step in the epoch or, if it is of the evaluation, its number."""

    epoch: int
    is_train: bool
    number: int


def steps_per_epoch(streams: Sequence[Stream], batch_size: int) -> int:
    """How many global batches an epoch has: those that the longest stream fills.

    Args:
        streams: all of the training split, also those of tasks that are not trained: a task trained
            alone takes as many steps as together with the others.
        batch_size: samples of each stream in a global batch.

    Raises:
        ValueError: not even one.
    """
    longest = max(streams, key=lambda stream: stream.num_samples)
    if longest.num_samples < batch_size:
        which = (
            "the training split" if len(streams) == 1 else f"the longest stream, {longest.name},"
        )
        raise ValueError(
            f"batch_size is {batch_size}, but {which} has {longest.num_samples} samples, which do "
            f"not fill one batch; take at most {longest.num_samples}."
        )
    return longest.num_samples // batch_size


def epoch_order(num_samples: int, *, seed: int, epoch: int, lap: int, stream: str) -> Indices:
    """The order of a stream's samples: a permutation that depends on these arguments alone.

    Args:
        num_samples: of the stream.
        seed: of the run.
        epoch: from 0.
        lap: how often the stream was used up in this epoch; above 0 only for shorter streams.
        stream: its name.

    Returns:
        [num_samples], every number once.
    """
    rng = np.random.default_rng([seed, epoch, lap, zlib.crc32(stream.encode())])
    return rng.permutation(num_samples)


def samplers_of(
    streams: Sequence[Stream],
    num_entries: int,
    *,
    seed: int,
    epoch: int,
    pairing: Literal["position", "class"],
) -> dict[str, Sampler]:
    """By stream, the order of an epoch with so many entries."""
    if pairing != "class":
        return {stream.name: _in_laps(stream, seed=seed, epoch=epoch) for stream in streams}
    longest = max(streams, key=lambda stream: stream.num_samples)
    anchor = epoch_order(longest.num_samples, seed=seed, epoch=epoch, lap=0, stream=longest.name)
    aligned = align_task_rows(streams, anchor[:num_entries], seed=seed, epoch=epoch)
    return {stream.name: _as_listed(*aligned[stream.name]) for stream in streams}


def _in_laps(stream: Stream, *, seed: int, epoch: int) -> Sampler:
    """One lap's order after the other; each is made when it is first reached."""
    orders: dict[int, Indices] = {}

    def draw(first: int, count: int) -> tuple[Indices, Indices]:
        laps, places = np.divmod(np.arange(first, first + count), stream.num_samples)
        for lap in np.unique(laps).tolist():
            if lap not in orders:
                orders[lap] = epoch_order(
                    stream.num_samples, seed=seed, epoch=epoch, lap=lap, stream=stream.name
                )
        indices = np.array([orders[lap][place] for lap, place in zip(laps, places, strict=True)])
        return indices, laps

    return draw


def _as_listed(indices: Indices, laps: Indices) -> Sampler:
    return lambda first, count: (indices[first : first + count], laps[first : first + count])


def check_alignable(streams: Sequence[Stream]) -> None:
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


def align_task_rows(
    streams: Sequence[Stream], anchor: Indices, *, seed: int, epoch: int
) -> Mapping[str, tuple[Indices, Indices]]:
    """An epoch's order of every stream, with one class a row.

    The longest stream keeps its own order and decides every row's class. In each other stream, the
    samples of a class come in a random order, and again in another one when they are used up; so
    the samples of a class are used equally often, give or take one.

    Args:
        streams: all of the training split; `check_alignable` refuses others.
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
