"""Arrow blocks in Ray's object store: work on each, and where a sample is.

Owns the index from a sample's number to its block and row, and executions without progress bars.
Reading samples into blocks is in `cache`, checking those of the user's own Datasets in `custom`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.block import BlockAccessor

from repmtl_ray import ray_compat
from repmtl_ray.data.stream import Stream

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoredStream:
    """One stream in the object store.

    Args:
        blocks: references to Arrow tables.
        block_of, row_of: [num_samples]; where each sample lies.
        contents: [num_samples]; a checksum of each sample's columns.
    """

    blocks: tuple[ray.ObjectRef[Any], ...]
    block_of: NDArray[np.int32]
    row_of: NDArray[np.int32]
    contents: NDArray[np.uint32]
    labelled: frozenset[str] = frozenset()
    """The tasks of which at least one sample has a label that losses read."""
    answers: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """As `validation.answers_in`, of all samples."""
    extremes: tuple[tuple[str, int], ...] = ()
    """The samples with the smallest and the largest value of each input of integers: what messages
    say of the value, and the sample's number."""


def views_of(table: Any) -> dict[str, NDArray[Any]]:
    """A table's columns, without copying."""
    views = BlockAccessor.for_block(table).to_numpy(table.column_names)
    assert isinstance(views, dict)
    return views


@dataclass(frozen=True)
class Summary:
    """What the index needs to know of a block: sample ids and checksums in order; errors; the tasks
    that have a label in it, and what yes-or-no labels there are; by input of integers, two pairs of
    a value and a sample id: the smallest and the largest."""

    ids: NDArray[np.int64]
    contents: NDArray[np.uint32]
    errors: list[str]
    labelled: frozenset[str] = frozenset()
    answers: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    extremes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)


def over_blocks(function: Callable[[Any], T], blocks: Sequence[ray.ObjectRef[Any]]) -> list[T]:
    """What a function makes of each block, in order; as many tasks as the cluster has CPUs."""
    size = math.ceil(len(blocks) / max(1, int(ray.cluster_resources().get("CPU", 1)))) or 1
    shares = [list(blocks[first : first + size]) for first in range(0, len(blocks), size)]
    results: list[list[T]] = ray.get(
        [_apply.remote(cast(Any, function), share) for share in shares]
    )
    return list(itertools.chain.from_iterable(results))


@ray.remote(num_cpus=0)
def _apply(function: Callable[[Any], T], blocks: list[ray.ObjectRef[Any]]) -> list[T]:
    """Many blocks a task: of tasks without a CPU, Ray would start any number at once."""
    return [function(ray.get(block)) for block in blocks]


def index_of(
    stream: Stream,
    blocks: tuple[ray.ObjectRef[Any], ...],
    summaries: Sequence[Summary],
    *,
    any_ids: bool = False,
) -> StoredStream:
    """Where each sample is, whatever the order and the size of the blocks.

    Sample ids are the numbers from 0 on, or, with `any_ids`, integers in whose order the samples
    are numbered.
    """
    ids = [summary.ids for summary in summaries]
    all_ids = np.concatenate(ids)
    distinct_ids, counts = np.unique(all_ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{stream.name}: sample_id {distinct_ids[counts > 1][0]} came {counts.max()} times; a "
            "stream's sample ids are unique."
        )
    if not any_ids and not np.array_equal(distinct_ids, np.arange(stream.num_samples)):
        raise ValueError(
            f"{stream.name}: sample ids are {distinct_ids.min()} to {distinct_ids.max()} over {len(distinct_ids)} "
            f"samples; expected the numbers 0 to {stream.num_samples - 1}."
        )
    order = np.argsort(all_ids)
    block_of = np.repeat(np.arange(len(ids)), [len(part) for part in ids])[order]
    row_of = np.concatenate([np.arange(len(part)) for part in ids])[order]
    return StoredStream(
        blocks=blocks,
        block_of=block_of.astype(np.int32),
        row_of=row_of.astype(np.int32),
        contents=np.concatenate([summary.contents for summary in summaries])[order],
        labelled=frozenset().union(*(summary.labelled for summary in summaries)),
        answers=_merged_answers(summaries),
        extremes=_extremes(summaries, distinct_ids),
    )


def _merged_answers(summaries: Sequence[Summary]) -> dict[str, NDArray[np.bool_]]:
    answers: dict[str, NDArray[np.bool_]] = {}
    for summary in summaries:
        for name, found in summary.answers.items():
            answers[name] = answers.get(name, False) | found
    return answers


def _extremes(summaries: Sequence[Summary], ids: NDArray[np.int64]) -> tuple[tuple[str, int], ...]:
    """As `StoredStream.extremes`; `ids` are those of all samples, in order."""
    found = []
    for name in dict.fromkeys(name for summary in summaries for name in summary.extremes):
        pairs = [summary.extremes[name] for summary in summaries if name in summary.extremes]
        ends = {"smallest": min(low for low, _ in pairs), "largest": max(high for _, high in pairs)}
        found += [
            (f"the {end} value of {name!r}, {value}", int(np.searchsorted(ids, sample_id)))
            for end, (value, sample_id) in ends.items()
        ]
    return tuple(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of Ray Data, whose settings are as before afterwards."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # among the warnings: that progress bars are off
    with ray_compat.data_context_warnings_ignored():
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        try:
            with ray.data.DataContext.current(context):
                yield
        finally:
            logger.setLevel(level)
