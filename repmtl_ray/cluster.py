"""Joining or starting Ray, and what the cluster has.

Owns the settings that Ray 2.60 needs for our runs not to hang, and the check that a request fits.
Imports Ray, nothing of torch.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

import ray

logger = logging.getLogger(__name__)

GROUP_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # at most one report is seen in an interval; the default is 2 s
    GROUP_START_TIMEOUT: "120",  # a trial that waits for its turn longer counts as failed
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of a notice that a node goes; the default is 5 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # else warnings about every trial's few processes
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
"""Set where the user has not: Ray reads them in the driver and passes them on."""


def connect(*, num_cpus: int | None = None) -> None:
    """Joins the Ray cluster that RAY_ADDRESS names or this machine is part of, or starts a local
    one.

    Does nothing if this process is connected already. RAY_ADDRESS=local always starts one.

    Args:
        num_cpus: logical CPUs of a cluster started here; None takes the machine's.

    A local cluster gets the dashboard (on loopback): without its HTTP server, Ray 2.60 never cleans
    up after a trial that Tune stops early, and the next one waits for ever (Ray issue 54305).
    """
    user_set = set(os.environ)
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    wanted = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if wanted == "local":
            raise ConnectionError("a local Ray was asked for")
        ray.init(address=wanted, **quiet)
        if GROUP_START_TIMEOUT not in user_set:
            os.environ[GROUP_START_TIMEOUT] = "900"  # an autoscaler's nodes take minutes to come
        print(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}", flush=True)
    except ConnectionError:
        if wanted not in ("auto", "local"):
            raise
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            **quiet,
        )
        print(f"started a local Ray with {available().cpus:g} CPUs", flush=True)


@dataclass(frozen=True)
class Available:
    """What all nodes have together, in use or not."""

    cpus: float
    gpus: float


def available() -> Available:
    resources = ray.cluster_resources()
    return Available(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def nodes() -> list[Available]:
    """What each node has."""
    return [
        Available(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def reachable() -> Available:
    """What the nodes have, or would have once an autoscaler has added all that its file allows."""
    from ray._private.state import state

    has, allowed = available(), state.get_max_resources_from_cluster_config() or {}
    return Available(max(has.cpus, allowed.get("CPU", 0)), max(has.gpus, allowed.get("GPU", 0)))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run's workers go; no result depends on it.

    Args:
        num_workers: data-parallel processes; each takes an equal part of every global batch. Two
            numbers, least and most: as many as the cluster has room for, which may change in
            mid-run.
        cpus_per_worker: logical CPUs that Ray reserves for each.
        gpus_per_worker: 0 trains on the CPU.
    """

    num_workers: int | tuple[int, int] = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"num_workers is {self.num_workers}; expected at least 1, or (least, most) in this order."
            )
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ValueError(
                f"a worker asks for {self.cpus_per_worker} CPUs and {self.gpus_per_worker} GPUs; expected more than 0 and at "
                "least 0."
            )

    @property
    def least(self) -> int:
        """Workers that a run needs."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that a run takes where there is room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def check_divides(self, batch_size: int) -> None:
        """Refuses numbers of workers that cannot share a global batch equally.

        Raises:
            ValueError: names those that cannot, and what can be done.
        """
        sizes = range(self.least, self.most + 1)
        unequal = [size for size in sizes if batch_size % size]
        if not unequal:
            return
        if len(sizes) == 1:
            step, which = self.least, f"{self.least}"
        else:
            step, which = math.lcm(*sizes), f"{self.least} to {self.most}"
        below = batch_size - batch_size % step
        near = " or ".join(str(size) for size in (below, below + step) if size)
        also = (
            f"; {', '.join(map(str, unequal))} do not divide it"
            if len(sizes) > len(unequal)
            else ""
        )
        raise ValueError(
            f"batch_size is {batch_size} over {which} workers; the global batch must divide evenly{also}: take {near}"
            f"{'' if len(sizes) == 1 else ', or a narrower range'}."
        )

    def check_fits(self) -> None:
        """Refuses a request that the cluster can never serve.

        Raises:
            ValueError: names what was asked for and what there is, nodes to come included.
        """
        if self.concurrent() >= 1:
            return
        has = reachable()
        raise ValueError(
            f"{self.least} workers with {self.cpus_per_worker:g} CPUs and "
            f"{self.gpus_per_worker:g} GPUs each do not fit this cluster of {has.cpus:g} CPUs and "
            f"{has.gpus:g} GPUs; lower the number of workers or what each asks for."
        )

    def concurrent(self) -> int:
        """How many such runs the cluster can hold at once, nodes to come included."""
        workers = sum(self._workers_on(node) for node in nodes())
        grown = reachable()
        if grown != available():
            workers = max(workers, self._workers_on(grown))
        return max(workers // self.most, int(workers >= self.least))

    def _workers_on(self, has: Available) -> int:
        fits = int(has.cpus // self.cpus_per_worker)
        return min(fits, int(has.gpus // self.gpus_per_worker)) if self.gpus_per_worker else fits
