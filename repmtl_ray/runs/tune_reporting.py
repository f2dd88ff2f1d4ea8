"""Every report of a Ray Train run, handed on to the Tune trial that waits for it.

Owns what stands in for Ray 2.60's `TuneReportCallback`, with which a search can wait for ever, or
lose a trial that was not on the lost node:

- Ray hands a report over in the trial's main thread, the only one that empties the slot through
  which it must go. Where the run ends before that thread has come to the last report, "ended" is in
  the slot already, and the trial stands still one epoch before its end. It takes a machine so busy
  that a run ends faster than Tune asks for its last report.
- Ray's queue is an actor that asks for nothing; such a one is placed on any node of the cluster.

Here a thread of the trial hands the reports over and the run's end waits for it; the queue is on
the trial's own node. Imported by Train's controller of every trial, so it imports little.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.train import UserCallback
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.train.v2.api.context import TrainRunContext  # type: ignore[attr-defined]


class ReportCallback(UserCallback):
    """Puts the first worker's metrics of every report into a queue; they are every worker's."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(
        self,
        run_context: TrainRunContext,
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        self._queue.put(dict(metrics[0]))


@contextlib.contextmanager
def reporting_to_tune() -> Iterator[ReportCallback]:
    """In a Tune trial: a Ray Train callback whose reports become the trial's. When the block is
    left, Tune has all of them.

    Raises:
        Exception: what kept them from Tune.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    faults: list[Exception] = []
    thread = threading.Thread(target=_report, args=(queue, faults), daemon=True)
    thread.start()
    try:
        yield ReportCallback(queue)
    finally:
        queue.put(None)
        thread.join()
        queue.shutdown(force=True)
    if faults:
        raise faults[0]


def _report(queue: Queue, faults: list[Exception]) -> None:
    """Until None comes. A trial that Tune stops ends this thread inside `report`."""
    from ray import tune

    try:
        while (metrics := queue.get()) is not None:
            tune.report(metrics)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        faults.append(error)
