"""Arrow blocks in Ray's object store: work on each, and where a sample is.

Owns the index from a sample's number to its block and row, and executions without progress bars.
Reading samples into blocks is in `cache`, checking those of the user's own Datasets in `custom`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


def views_of(table: Any) -> dict[str, NDArray[Any]]:
    """A table's columns, without copying."""
    views = BlockAccessor.for_block(table).to_numpy(table.column_names)
    assert isinstance(views, dict)
    return views


@dataclass(frozen=True)
class Summary:
    """What the index needs to know of a block: sample ids and checksums in order; errors; the tasks
    that have a label in it."""

    ids: NDArray[np.int64]
    contents: NDArray[np.uint32]
    errors: list[str]
    labelled: frozenset[str] = frozenset()


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
    )


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
