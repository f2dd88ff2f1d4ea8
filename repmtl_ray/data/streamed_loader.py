"""A worker's batches of rows that are streamed: its slices come from the run's reader.

Owns the start of the reader and the way of its slices into batches. Views are made here, in threads of
the worker, by the functions that make those of samples that are kept (`plan`). A split that is kept
is batched by the worker's threads as always.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import zlib
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from repmtl_ray.data.batches import planned_batches, planned_eval_batches, prefetched
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.data_actor import RunBatches
from repmtl_ray.data.plan import (
    DataError,
    EvalBatches,
    EvalPlan,
    Part,
    TrainBatches,
    TrainPlan,
    packed,
)
from repmtl_ray.data.ray_pipeline import is_out_of_memory
from repmtl_ray.data.row_reader import Pass, RowReader, Slice, out_of_memory
from repmtl_ray.data.sampler import Place
from repmtl_ray.data.streamed import RowsRead, StreamedSplit

logger = logging.getLogger(__name__)

Reader: TypeAlias = Any
"""The handle of a `RowReader`."""
LOOK_EVERY_S = 0.5
"""Between two looks at whether the worker still wants the slice that it waits for."""
WARN_AFTER_S = 60.0


class _ClosedError(Exception):
    """The worker needs no more slices."""


def start_reader(batches: RunBatches, *, num_cpus: int, name: str) -> Reader:
    """Starts the reader of a run on this node.

    Args:
        batches: of this worker.
        num_cpus: that the tasks of Ray Data may use.
        name: under which the other workers find it.
    """
    train, evaluation = batches.train, batches.evaluation
    passes = {}
    if isinstance(batches.train_split, StreamedSplit):
        passes[True] = Pass(
            split=batches.train_split,
            tasks=train.tasks,
            batch_size=train.batch_size,
            num_batches=train.num_steps,
            seed=train.seed,
        )
    if isinstance(batches.eval_split, StreamedSplit):
        passes[False] = Pass(
            split=batches.eval_split,
            tasks=evaluation.tasks,
            batch_size=evaluation.batch_size * evaluation.workers.size,
            num_batches=None,
            seed=train.seed,
        )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": train.workers.size}
    made = ray.remote(RowReader).options(name=name, **options)
    return made.remote(passes, train.workers.size, num_cpus)


class StreamedLoader:
    """A `batches.Loader` of splits of which at least one is streamed.

    Args:
        batches: of the run, for this worker.
        reader: of the run.
    """

    def __init__(self, batches: RunBatches, reader: Reader) -> None:
        self._batches = batches
        self._reader = reader
        self.rows_read: dict[str, RowsRead] = {}

    def train(
        self, plan: TrainPlan, *, epoch: int, first_step: int, dtype: torch.dtype
    ) -> Iterator[Batch]:
        """As `Loader.train`."""
        split = self._batches.train_split
        if not isinstance(split, StreamedSplit):
            rows = {s.name: split.rows(s) for s in plan.selected}
            return planned_batches(plan, rows, epoch=epoch, first_step=first_step, dtype=dtype)
        (stream,) = plan.selected
        key = (plan.seed, epoch, 0, zlib.crc32(stream.name.encode()))
        maker, closed = TrainBatches(plan, {}), threading.Event()

        def make() -> Iterator[tuple[Batch, RowsRead]]:
            for step in range(first_step, plan.num_steps):
                samples, read = self._slice_of(Place(epoch, True, step), plan.workers.rank, closed)
                assert samples, "an epoch has so many steps"
                parts = maker.pack([Part(stream, samples, [key] * plan.num_own)])
                yield maker.unpack(parts, dtype), read

        return self._noted("train", prefetched(make, 1, interrupt=closed.set))

    def evaluate(self, plan: EvalPlan, *, epoch: int, dtype: torch.dtype) -> Iterator[Batch]:
        """As `Loader.evaluate`."""
        split = self._batches.eval_split
        if not isinstance(split, StreamedSplit):
            rows = {s.name: split.rows(s) for s in plan.selected}
            return planned_eval_batches(plan, rows, dtype=dtype)
        (stream,) = plan.selected
        maker, closed = EvalBatches(plan, {}), threading.Event()

        def make() -> Iterator[tuple[Batch | None, RowsRead]]:
            for number in itertools.count():
                samples, read = self._slice_of(
                    Place(epoch, False, number), plan.workers.rank, closed
                )
                part = packed(stream, samples, plan.tasks) if samples else None
                yield None if part is None else maker.unpack([part], dtype), read
                if samples is None:
                    return

        return self._noted("evaluation", prefetched(make, 1, interrupt=closed.set))

    def _noted(
        self, split: str, batches: Generator[tuple[Batch | None, RowsRead], None, None]
    ) -> Iterator[Batch]:
        """The batches; what was read of their split is noted when the consumer gets them."""
        with contextlib.closing(batches):
            for batch, rows_read in batches:
                self.rows_read[split] = rows_read
                if batch is not None:
                    yield batch

    def _slice_of(self, place: Place, rank: int, closed: threading.Event) -> Slice:
        """This worker's rows of a global batch.

        Raises:
            DataError: what is wrong with the rows; Ray ended the reader for its memory.
            ray.exceptions.RayError: the reader died; a run goes on from its checkpoint.
        """
        known = self.rows_read.get("train" if place.is_train else "evaluation", {})
        found = self._reader.slice_of.remote(place, rank, known)
        waited_s = 0.0
        while not ray.wait([found], timeout=LOOK_EVERY_S)[0]:
            if closed.is_set():
                raise _ClosedError
            waited_s += LOOK_EVERY_S
            if waited_s % WARN_AFTER_S == 0:
                logger.warning(
                    "no rows came for %.0f s: they wait for a free CPU, or take long to read (a run that "
                    "continues inside an epoch reads it from its beginning)",
                    waited_s,
                )
        try:
            part = ray.get(found)
        except ray.exceptions.RayError as error:
            split = self._batches.train_split if place.is_train else self._batches.eval_split
            assert isinstance(split, StreamedSplit)
            if isinstance(error, ray.exceptions.OutOfMemoryError):
                raise DataError(out_of_memory(split)) from error
            if is_out_of_memory(error):  # or a kill for another reason, which Ray cannot tell apart
                message = f"the row reader was killed, perhaps for memory: {out_of_memory(split)}"
                raise ray.exceptions.RayError(message) from error
            raise
        if isinstance(part, str):
            raise DataError(part)
        # Copies: views change rows in place, and the reader's memory is not this process's.
        samples = part.samples and {n: np.array(values) for n, values in part.samples.items()}
        return Slice(samples, part.rows_read)
