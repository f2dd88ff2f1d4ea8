"""A worker's batches from a pipeline of Ray Data, whose actors read and augment on any node.

One row of the dataset is a few numbers of the run's plan: (first, count) stands for so many batches
of this worker, training steps and the evaluation after each epoch in one sequence. An actor pool
turns a row into packed batches by the functions that the worker's own threads call too (`plan`), so
the batches are equal to the bit. Ray Data keeps the rows in order and limits how many are made ahead. If
an actor or its node dies, a new execution starts at the batch that the worker needs next.

Every worker executes a dataset of its own, from the step of its checkpoint to the end of the run. The
alternative, `streaming_split` of one dataset for all workers, hands blocks to whoever asks first, so a
row could not be meant for one worker; it also ends with any worker, where here the others go on. One
execution lasts for all epochs, because a new one costs the start of its actors.

Owns the execution of the dataset; what an actor does is in `data_actor`. Whether a run uses it is
decided in `placement.Placement`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources

from repmtl_ray import ray_compat
from repmtl_ray.data.batches import planned_batches, planned_eval_batches, prefetched
from repmtl_ray.data.blocks import quiet
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.data_actor import (
    DataActor,
    RunBatches,
    makers_of,
    out_of_memory,
    packed_batches,
    place_of,
    signed,
)
from repmtl_ray.data.plan import (
    DataError,
    EvalBatches,
    EvalPlan,
    PackedPart,
    TrainBatches,
    TrainPlan,
)
from repmtl_ray.data.stream import Stream

logger = logging.getLogger(__name__)

TASK_BYTES = 24 * 2**20
"""Of the batches that one task makes, about; a task costs milliseconds whatever it makes."""
TASK_S = 0.5
"""Of the reading that one task does, about: the first batch waits for its whole task."""
MAX_TASK_BATCHES = 8
MAX_TASKS = 2_000
"""Of one execution. Ray Data stores every row before the first one is read, a millisecond for each;
a longer run takes one execution after the other."""
AHEAD = 2
"""Tasks of each actor whose batches may wait for the worker or be in the making."""
TAKEN = 3
"""Tasks whose batches the worker's process holds or fetches. Ray Data counts them too: without room for
them beside those of the actors, it gave tasks to one actor alone, and all others had nothing to do."""
MAX_FAILURES = 3
"""Executions in succession that may fail without one batch from any of them."""


class _ActorsDied(ray.exceptions.RayError):
    """All data actors died while they had nothing to do."""


class _ClosedError(Exception):
    """The worker needs no more batches of an execution."""


class _SigningActor(DataActor):
    """A data actor that signs its batches with its id in Ray."""

    def __call__(self, row: dict[str, NDArray[Any]]) -> pyarrow.Table:
        actor = ray.get_runtime_context().get_actor_id()
        assert actor is not None, "Ray Data calls it in an actor"
        return signed(super().__call__(row), actor)


class RayLoader:
    """A `batches.Loader` whose batches data actors make.

    Args:
        batches: of the run, for this worker.
        num_epochs: of the run.
        num_actors: how many processes make this worker's batches, each with one CPU.
        timeout_s: how long the start of the actors may take; None: any time.
        may_fall_back: whether threads of this process make the batches if the actors do not come.
    """

    def __init__(
        self,
        batches: RunBatches,
        *,
        num_epochs: int,
        num_actors: int,
        timeout_s: float | None = None,
        may_fall_back: bool = False,
    ) -> None:
        self.note = ""
        """What a user should know: that the actors did not come."""
        self.batches = batches
        self.rows_read: dict[str, dict[int, int]] = {}
        self._timeout_s = timeout_s
        self._may_fall_back = may_fall_back
        self._num_steps = batches.train.num_steps
        self._num_epoch = batches.num_epoch
        self._end = num_epochs * self._num_epoch
        self._num_actors = num_actors
        self._next: int | None = None
        self._items: Generator[tuple[int, Batch], None, None] | None = None
        self._execution: ray.data.Dataset | None = None
        self._makers: set[str] = set()
        """Ids of the actors that made batches in this execution."""

    def train(
        self, plan: TrainPlan, *, epoch: int, first_step: int, dtype: torch.dtype
    ) -> Iterator[Batch]:
        """As `Loader.train`."""
        assert plan == self.batches.train, "the actors have the plan of another run"
        first = epoch * self._num_epoch + first_step
        num_batches = self._num_steps - first_step

        def local(done: int) -> Iterator[Batch]:
            rows = {s.name: self.batches.train_split.rows(s) for s in plan.selected}
            return planned_batches(
                plan, rows, epoch=epoch, first_step=first_step + done, dtype=dtype
            )

        return self._between(first, first + num_batches, dtype, local)

    def evaluate(self, plan: EvalPlan, *, epoch: int, dtype: torch.dtype) -> Iterator[Batch]:
        """As `Loader.evaluate`."""
        assert plan == self.batches.evaluation, "the actors have the plan of another run"
        first = epoch * self._num_epoch + self._num_steps

        def local(done: int) -> Iterator[Batch]:
            rows = {s.name: self.batches.eval_split.rows(s) for s in plan.selected}
            return itertools.islice(planned_eval_batches(plan, rows, dtype=dtype), done, None)

        return self._between(first, (epoch + 1) * self._num_epoch, dtype, local)

    def close(self) -> None:
        """Ends the execution and its actors."""
        if self._items is not None:
            self._items.close()
        self._items = self._next = None

    def _between(
        self, first: int, end: int, dtype: torch.dtype, local: Callable[[int], Iterator[Batch]]
    ) -> Iterator[Batch]:
        """The batches from a number to another.

        Args:
            first, end: the numbers.
            dtype: of images, depths and normals.
            local: makes them in this process, without the first so many.
        """
        for wanted in range(first, end):
            if not self.note:
                try:
                    batch = self._take(wanted, dtype)
                except TimeoutError as error:
                    self._give_up(error)
            if self.note:
                yield from local(wanted - first)
                return
            yield batch

    def _take(self, wanted: int, dtype: torch.dtype) -> Batch:
        if self._next != wanted:
            self.close()
            self._items = prefetched(
                lambda: self._from(wanted, dtype),
                1,
                while_waiting=self._look_after_actors,
                interrupt=lambda: self._end_execution(_ClosedError()),
            )
        assert self._items is not None
        number, batch = next(self._items)
        assert number == wanted, "Ray Data keeps the order of rows"
        self._next = wanted + 1
        return batch

    def _look_after_actors(self) -> None:
        """Ends this execution if all its actors are dead, so that `_from` starts another: Ray Data does
        not see the death of an actor that has no task."""
        makers = tuple(self._makers)
        if makers and all(ray_compat.is_dead(bytes.fromhex(maker)) for maker in makers):
            self._end_execution(_ActorsDied("all data actors died while they had nothing to do"))

    def _end_execution(self, error: Exception) -> None:
        if self._execution is not None:
            ray_compat.end_execution(self._execution, error)

    def _give_up(self, error: TimeoutError) -> None:
        """Notes that the actors did not come in time.

        Raises:
            DataError: it was asked for data actors and nothing else.
        """
        waited = f"{self._num_actors} data actors did not start within {self._timeout_s:g} s: the cluster has too few free CPUs"
        if not self._may_fall_back:
            raise DataError(
                f"{waited}; free CPUs or lower data_cpus, or take data='worker'."
            ) from error
        self.note = f"{waited}; the worker's own threads made the batches, which are the same."
        logger.warning(self.note)
        self.close()

    def _from(self, first: int, dtype: torch.dtype) -> Iterator[tuple[int, Batch]]:
        """All batches from a number to the end of the run, whatever dies meanwhile."""
        train = TrainBatches(self.batches.train, {})
        evaluation = EvalBatches(self.batches.evaluation, {})
        failures = 0
        while first < self._end:
            try:
                for number, parts in self._execute(first):
                    place = place_of(number, self._num_steps, self._num_epoch)
                    if place.is_train:
                        packed = _with_streams(train.plan.selected, parts)
                        yield number, train.unpack(packed, dtype)
                    else:
                        packed = _with_streams((evaluation.stream_of(place.number),), parts)
                        yield number, evaluation.unpack(packed, dtype)
                    first, failures = number + 1, 0
            except ray.exceptions.GetTimeoutError:  # of `wait_for_min_actors_s`
                raise
            except ray.exceptions.RayError as error:
                failures += 1
                logger.warning("data actors start again at batch %d: %s", first, _reason(error))
                if failures < MAX_FAILURES:
                    continue
                if is_out_of_memory(error):
                    message = out_of_memory(train.plan, self.batches.cost().num_bytes)
                    raise DataError(message) from error
                raise

    def _execute(self, first: int) -> Iterator[tuple[int, list[dict[str, NDArray[Any]]]]]:
        """One execution of Ray Data; its batches until the end, or until it has had `MAX_TASKS`."""
        cost = self.batches.cost()
        size = min(MAX_TASK_BATCHES, TASK_BYTES / cost.num_bytes, TASK_S / cost.seconds)
        size = max(1, int(size))
        firsts = range(first, self._end, size)[:MAX_TASKS]
        rows = [{"first": n, "count": min(size, self._end - n)} for n in firsts]
        with quiet(), ray.data.DataContext.current(self._context(size * cost.num_bytes)):
            plan = ray.data.from_items(rows, override_num_blocks=len(rows))
            made = plan.map_batches(
                _SigningActor,
                fn_constructor_kwargs={"batches": self.batches},
                batch_size=None,
                batch_format="numpy",
                compute=ActorPoolStrategy(
                    size=self._num_actors, max_tasks_in_flight_per_actor=AHEAD
                ),
                num_cpus=1,
                max_restarts=0,  # an actor that restarts waits for a CPU that may not come back
            )
            self._makers, self._execution = set(), made
            for table in made.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=1
            ):
                self._makers |= makers_of(table)
                yield from packed_batches(table)

    def _context(self, task_bytes: int) -> DataContext:
        context = DataContext.get_current().copy()
        if self._timeout_s is not None:
            context.wait_for_min_actors_s = math.ceil(self._timeout_s)
        context.execution_options = ExecutionOptions(
            preserve_order=True,
            resource_limits=ExecutionResources.for_limits(
                cpu=self._num_actors,
                object_store_memory=math.ceil(
                    (AHEAD * self._num_actors + TAKEN) * task_bytes * 1.1
                ),
            ),
        )
        return context


def _with_streams(
    streams: Sequence[Stream], parts: Sequence[Mapping[str, NDArray[Any]]]
) -> list[PackedPart]:
    return [PackedPart(stream, dict(part)) for stream, part in zip(streams, parts, strict=True)]


def _reason(error: BaseException) -> str:
    """The last line of an error of Ray, which says most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor, or the kernel, ended a data actor."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or (
        isinstance(error, ray.exceptions.ActorDiedError) and "OOM" in str(error)
    )
