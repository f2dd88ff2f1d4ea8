"""Nodes that leave and join a cluster of real raylets on this machine while a run trains, for
`bench/survival.py` and the tests.

`bench/faults.py` slows the run down, so that it lasts longer than what happens to it, and logs the
steps of its workers.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig

from bench import faults
from repmtl_ray import ray_compat, train
from repmtl_ray.train import FitResult

NOTICE_S = 4.0
PACE_S = 0.7
"""Seconds per step: 24 steps take longer than a notice, or Ray's search for new nodes, and the start of new workers."""
LOOK_EVERY_S = 2.0
"""Seconds between two searches for new nodes; otherwise a run searches once per minute."""
PACE_ALONE_S = 4.0
"""Seconds per step until a second node has come, which takes long on a busy machine."""
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 256 * 2**20}

Run = Callable[[int | tuple[int, int]], FitResult]
"""Calls `fit` for the folder with this number of workers."""


def preempted(run: Run, folder: Path, at: int, *, elastic: bool) -> FitResult:
    """Takes away the node without the driver in the middle of a run.

    The node is announced to go when a step is reached, and goes `NOTICE_S` later. For a run of exactly
    two workers, another node comes. An elastic run with one or two workers continues with one.
    """
    with _nodes(2) as (nodes, goes), _running(run, folder, (1, 2) if elastic else 2) as result:
        _wait_for_step(folder, at, result)
        ray_compat.announce_preemption(goes.node_id, time.time() + NOTICE_S)
        time.sleep(NOTICE_S)
        _log(folder, "preemption, elastic" if elastic else "preemption", result)
        nodes.remove_node(goes, allow_graceful=False)
        if not elastic:
            nodes.add_node(**NODE)
        return result.result()


def arrived(run: Run, folder: Path, at: int) -> FitResult:
    """Adds a node when an elastic run with one worker has reached a step; it continues with two."""
    often = functools.partial(
        ScalingConfig,
        elastic_resize_monitor_interval_s=LOOK_EVERY_S,  # type: ignore[call-arg]  # V1's annotations
    )
    with (
        mock.patch.object(train, "ScalingConfig", often),
        _nodes(1) as (nodes, _),
        _running(run, folder, (1, 2), pace_alone_s=PACE_ALONE_S) as result,
    ):
        _wait_for_step(folder, at, result)
        _log(folder, "arrival, elastic", result)
        nodes.add_node(**NODE)
        found = result.result()
    sizes = [event["workers"] for event in faults.events_of(folder) if event["event"] == "step"]
    if (sizes[0], sizes[-1]) != (1, 2):
        raise RuntimeError(f"the run had {sizes[0]} workers first and {sizes[-1]} in the end")
    return found


@contextlib.contextmanager
def _nodes(count: int) -> Iterator[tuple[Cluster, Any]]:
    """A cluster of nodes with one CPU each that this process has joined, and the node added last."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, **head})
    try:
        last = [nodes.add_node(**NODE) for _ in range(count - 1)]
        ray.init(address=nodes.address, log_to_driver=False)
        nodes.wait_for_nodes()
        yield nodes, last[-1] if last else None
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextlib.contextmanager
def _running(
    run: Run, folder: Path, workers: int | tuple[int, int], **paces: float
) -> Iterator[Future[FitResult]]:
    """Runs in a thread, because nodes must be added and removed in the main thread."""
    faults.plan_faults(folder, [], **(paces or {"pace_s": PACE_S}))
    with mock.patch.object(train, "run_worker", faults.worker), ThreadPoolExecutor(1) as other:
        yield other.submit(run, workers)


def _wait_for_step(folder: Path, at: int, result: Future[FitResult]) -> None:
    while not any(e["event"] == "step" and e["at"] >= at for e in faults.events_of(folder)):
        if result.done():
            raise RuntimeError(f"the run ended before step {at}") from result.exception()
        time.sleep(0.05)


def _log(folder: Path, event: str, result: Future[FitResult]) -> None:
    if result.done():
        raise RuntimeError("the run ended before anything happened: a larger PACE_S is needed")
    steps = [one["at"] for one in faults.events_of(folder) if one["event"] == "step"]
    faults.log_event(folder, event, steps[-1])
