"""The samples of a split, read and checked once, and kept where all workers get them.

Owns reading with Ray Data: in parallel, anywhere in the cluster, before training begins, so that a
broken file is an error of the data and not of the thousandth step. Samples that fit stay in Ray's
object store: workers map the blocks into their memory and pick rows from them. Those that do not
fit are read again by the workers that need them (`storage_rows`). Order and augmentation are in
`batches` and do not depend on which it is.

The objects live as long as the process that called `cache_streams`. Files must be readable under
the same path on every node.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from repmtl_ray.data import validation
from repmtl_ray.data.blocks import (
    StoredStream,
    Summary,
    index_of,
    over_blocks,
    quiet,
    views_of,
)
from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.sampler import Indices
from repmtl_ray.data.stream import Kind, Stream, contents_of, fingerprint_of

# `batches` needs torch, which reading tasks do not: they start several times as fast without it.
if TYPE_CHECKING:
    from repmtl_ray.data.batches import Rows
    from repmtl_ray.data.streamed import StreamedSplit

T = TypeVar("T")

BLOCK_BYTES = 16 * 2**20
"""Of a block, about: what a reading task holds in memory."""
STORE_SHARE = 0.8
"""Of the object store of the cluster's smallest node: what the samples of a run may take."""
_ERROR = "error"
_CONTENT = "content"  # no task has this name: only a column of checksums that `_load_block` made
_LABELLED = (
    "labelled"  # likewise; bit k of it: whether the sample has a label of its stream's task k
)
_ERRORS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CachedSplit:
    """A split in the object store; small itself, so it can go into tasks, actors and trainers.

    Args:
        streams: whose samples they are.
        cached: by stream, where the samples are.
        num_bytes: of all samples together, about.
        fingerprint: of their content; equal content has the same, wherever it was read from.
    """

    streams: tuple[Stream, ...]
    cached: Mapping[str, StoredStream]
    num_bytes: int
    fingerprint: str

    @property
    def labelled(self) -> frozenset[str]:
        """The tasks of which at least one sample has a label that losses read."""
        return frozenset().union(*(part.labelled for part in self.cached.values()))

    @property
    def answers(self) -> dict[str, NDArray[np.bool_]]:
        """As `validation.answers_in`, of all samples."""
        return {n: found for part in self.cached.values() for n, found in part.answers.items()}

    def rows(self, stream: Stream) -> Rows:
        """The samples of one of the streams, for use in this process."""
        return _CachedRows(self.cached[stream.name])


@dataclass(frozen=True, kw_only=True)
class UncachedSplit:
    """A split that stays where it is, every sample checked once; otherwise as `CachedSplit`."""

    streams: tuple[Stream, ...]
    num_bytes: int
    fingerprint: str
    labelled: frozenset[str]

    def rows(self, stream: Stream) -> Rows:
        """The samples of one of the streams, for use in this process."""
        from repmtl_ray.data.storage_rows import StorageRows

        return StorageRows(stream)


CheckedSplit: TypeAlias = "CachedSplit | UncachedSplit | StreamedSplit"
"""A split that workers can train on. All samples of the first two were read and checked once."""


def check_labels(split: str, checked: CheckedSplit, tasks: Sequence[str]) -> None:
    """Refuses a split in which a task has no label at all: nothing could be learned or measured.

    Args:
        split: its name, for the message.
        checked: its samples.
        tasks: names of those that are trained.

    Raises:
        ValueError: names the task and what counts as a label.
    """
    for stream in checked.streams:
        for task in tasks:
            if task in stream.kinds and task not in checked.labelled:
                raise ValueError(validation.no_label(split, task, stream.num_samples))


class _CachedRows:
    def __init__(self, cached: StoredStream) -> None:
        self._cached = cached
        self._views: dict[int, dict[str, NDArray[Any]]] = {}

    def __len__(self) -> int:
        return len(self._cached.block_of)

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        blocks, places = self._cached.block_of[indices], self._cached.row_of[indices]
        self._map(sorted(set(blocks.tolist()) - self._views.keys()))
        used = [self._views[block] for block in sorted(set(blocks.tolist()))]
        names = used[0] if columns is None else columns
        gathered = {
            name: _room(name, len(indices), [view[name] for view in used]) for name in names
        }
        for row, (block, place) in enumerate(zip(blocks.tolist(), places.tolist(), strict=True)):
            view = self._views[block]
            for name, values in gathered.items():
                values[row] = view[name][place]
        return gathered

    def _map(self, missing: list[int]) -> None:
        """Maps blocks into this process, from this node's store or another's; they stay mapped."""
        tables = ray.get([self._cached.blocks[block] for block in missing])
        for block, table in zip(missing, tables, strict=True):
            self._views[block] = views_of(table)


def _room(name: str, count: int, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Space for rows of blocks, which may differ in a Ray Dataset: a type that holds the numbers of
    all of them, and an array of objects where their rows have several lengths."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        return np.empty(count, dtype=object)
    dtype = np.result_type(*{part.dtype for part in parts})
    return np.empty((count, *shapes.pop()), np.int64 if name == SAMPLE_ID else dtype)


def check_and_cache(streams: Sequence[Stream], *, used_bytes: int = 0) -> CheckedSplit:
    """`cache_streams` if the samples fit the object store, else `check_streams`.

    Args:
        streams: of one split.
        used_bytes: what other splits take of the object store.
    """
    num_bytes = sum(_sizes(streams))
    store = _smallest_store()
    if used_bytes + num_bytes <= STORE_SHARE * store:
        return cache_streams(streams)
    print(
        f"{num_bytes / 2**30:.1f} GiB of samples do not fit the object store "
        f"({store / 2**30:.1f} GiB): they are checked once, then read again every epoch",
        flush=True,
    )
    return check_streams(streams)


def check_streams(streams: Sequence[Stream]) -> UncachedSplit:
    """Reads every sample of the streams once, as `cache_streams` does, and keeps none."""
    sizes = _sizes(streams)
    with quiet():
        read = {
            stream.name: _read(stream, size, 0, keep=False)
            for stream, size in zip(streams, sizes, strict=True)
        }
    return UncachedSplit(
        streams=tuple(streams),
        num_bytes=sum(sizes),
        fingerprint=fingerprint_of({name: part.contents for name, part in read.items()}),
        labelled=frozenset().union(*(part.labelled for part in read.values())),
    )


def cache_streams(streams: Sequence[Stream], *, num_cpus_per_task: float = 0) -> CachedSplit:
    """Reads every sample of the streams once and keeps them in the object store.

    Args:
        streams: of one split.
        num_cpus_per_task: logical CPUs that a reading task reserves. With 0 it also runs while
            training workers or Tune trials hold every CPU; there are never more tasks than the
            cluster has CPUs.

    Returns:
        The way to the samples; needs this process alive.

    Raises:
        ValueError: samples that their streams refuse, with the streams' messages; the first five,
            and how many there are.
    """
    sizes = _sizes(streams)
    warn_if_large(sum(sizes))
    with quiet():
        cached = {
            stream.name: _read(stream, size, num_cpus_per_task)
            for stream, size in zip(streams, sizes, strict=True)
        }
    contents = {name: part.contents for name, part in cached.items()}
    return CachedSplit(
        streams=tuple(streams),
        cached=cached,
        num_bytes=sum(sizes),
        fingerprint=fingerprint_of(contents),
    )


def _sizes(streams: Sequence[Stream]) -> list[int]:
    """Bytes of each, about: as if every sample were like the first."""
    return [
        stream.num_samples * sum(values.nbytes for values in stream.load(0).values())
        for stream in streams
    ]


def _read(
    stream: Stream, num_bytes: int, num_cpus_per_task: float, *, keep: bool = True
) -> StoredStream:
    """Loads all samples; without `keep`, what it returns has the checksums alone."""
    num_readers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    num_blocks = max(
        math.ceil(num_bytes / BLOCK_BYTES),
        min(2 * num_readers, stream.num_samples),
    )
    # from_items, because the reading tasks of ray.data.range would wait for a whole free CPU.
    numbers = ray.data.from_items(list(range(stream.num_samples)), override_num_blocks=num_blocks)
    dataset = numbers.map_batches(
        cast(Any, _load_block),
        batch_size=None,
        fn_kwargs={"stream": stream, "keep": keep},
        num_cpus=num_cpus_per_task,
        compute=ray.data.TaskPoolStrategy(size=min(num_readers, num_blocks)),
    )
    blocks = tuple(dataset.materialize().to_arrow_refs())
    summaries = over_blocks(partial(_summary, kinds=stream.kinds), blocks)
    _raise_errors(stream, [error for summary in summaries for error in summary.errors])
    return index_of(stream, blocks, summaries)


def _load_block(
    batch: dict[str, NDArray[Any]], *, stream: Stream, keep: bool
) -> dict[str, NDArray[Any]]:
    """Samples by number, stacked, or their checksums; if any was refused, the messages.

    Messages travel as data: an exception would reach the user inside two others of Ray, after a
    report in the log, and would hide all errors but the first.
    """
    samples, errors = [], []
    for index in batch["item"].tolist():
        try:
            samples.append(stream.load(index))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        return {_ERROR: np.array(errors)}
    stacked = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    if keep:
        return stacked
    bits = [2 ** np.arange(len(stream.kinds)) @ _labels_of(s, stream.kinds) for s in samples]
    return {
        SAMPLE_ID: stacked[SAMPLE_ID],
        _CONTENT: contents_of(stacked),
        _LABELLED: np.array(bits, dtype=np.int64),
    }


def _labels_of(columns: Mapping[str, NDArray[Any]], kinds: Mapping[str, Kind]) -> list[bool]:
    return [validation.is_labelled(columns[name], kind) for name, kind in kinds.items()]


def _summary(table: Any, *, kinds: Mapping[str, Kind]) -> Summary:
    if _ERROR in table.column_names:
        nothing = np.array([], dtype=np.int64)
        return Summary(nothing, nothing.astype(np.uint32), table.column(_ERROR).to_pylist())
    columns = views_of(table)
    known = columns.get(_CONTENT)
    if known is None:
        known, has_labels = contents_of(columns), _labels_of(columns, kinds)
    else:
        bits = int(np.bitwise_or.reduce(columns[_LABELLED]))
        has_labels = [bool(bits >> place & 1) for place in range(len(kinds))]
    labelled = frozenset(itertools.compress(kinds, has_labels))
    answers = validation.answers_in(columns, kinds)
    return Summary(columns[SAMPLE_ID], known, [], labelled, answers)


def _raise_errors(stream: Stream, errors: list[str]) -> None:
    if not errors:
        return
    if len(errors) == 1:
        raise ValueError(errors[0])
    errors.sort()
    more = [f"and {len(errors) - _ERRORS_SHOWN} more"] if len(errors) > _ERRORS_SHOWN else []
    raise ValueError(
        f"{stream.name}: {len(errors)} of {stream.num_samples} samples cannot be used:\n"
        + "\n".join([*errors[:_ERRORS_SHOWN], *more])
    )


def _smallest_store() -> float:
    return min(
        node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]
    )


def warn_if_large(num_bytes: int) -> None:
    smallest = _smallest_store()
    if num_bytes > STORE_SHARE * smallest:
        warnings.warn(
            f"the samples take {num_bytes / 2**30:.1f} GiB, the smallest object store of the "
            f"cluster has {smallest / 2**30:.1f} GiB: Ray will keep the rest on disk and training "
            "will wait for it. Start Ray with a larger --object-store-memory, or make the images "
            "smaller (data.height, data.width).",
            stacklevel=3,
        )
