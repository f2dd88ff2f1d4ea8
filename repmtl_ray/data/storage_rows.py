"""The samples of a stream that is too large to be kept: read each time they are asked for.

Owns the reading threads. Like every `Rows` it hands out samples by number, so the order of an
epoch, what each worker sees and every view are those of samples kept in memory, to the bit: a
sample is read by the one worker that needs it, or by its data actors, once an epoch. That takes
storage that finds samples by number: shards do (`shards`), and folders of files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmtl_ray.data.sampler import Indices
from repmtl_ray.data.stream import Sample, Stream

NUM_THREADS = 16
"""Of a stream in a worker, for storage that is waited for: from a bucket that answers in t seconds
a worker gets at most NUM_THREADS / t samples a second."""
FEW_THREADS = 2
"""For storage that answers at once: more threads would only wait for each other."""
SLOW_S = 0.003
"""From how long a sample's reading counts as waiting."""


class StorageRows:
    """Reads samples in threads and keeps none.

    Args:
        stream: where they come from; every sample was loaded before, by whoever checked it.
        num_threads: how many samples are read at a time, at most.
    """

    def __init__(self, stream: Stream, *, num_threads: int = NUM_THREADS) -> None:
        self._stream = stream
        self._load = stream.reload or stream.load
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="reading")

    def __len__(self) -> int:
        return self._stream.num_samples

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        first = self._load(int(indices[0]))
        slow = time.perf_counter() - start > SLOW_S
        names = list(first) if columns is None else columns
        gathered = {
            name: np.empty((len(indices), *first[name].shape), first[name].dtype) for name in names
        }

        def put(row: int, sample: Sample) -> None:
            for name in names:
                gathered[name][row] = sample[name]

        def read(rows: NDArray[np.int64]) -> None:
            for row in rows.tolist():
                put(row, self._load(int(indices[row])))

        put(0, first)
        num_parts = self._num_threads if slow else min(FEW_THREADS, self._num_threads)
        for _ in self._threads.map(read, np.array_split(np.arange(1, len(indices)), num_parts)):
            pass
        return gathered
