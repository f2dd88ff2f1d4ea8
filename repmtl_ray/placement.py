"""Where the workers of a run go, and who reads their data.

Owns `Placement` and the checks that a request fits the cluster. No result depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from repmtl_ray import cluster
from repmtl_ray.conversion import check, check_range, check_types

MAX_WORKERS = 65_536
MAX_DATA_CPUS = 4
"""Data actors that a worker gets without asking for a number."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run's workers go; no result depends on it.

    Args:
        num_workers: data-parallel processes; each takes an equal part of every global batch. Two
            numbers, least and most: as many as the cluster has room for, which may change in
            mid-run.
        cpus_per_worker: logical CPUs that Ray reserves for each.
        gpus_per_worker: 0 trains on the CPU. A fraction (0.25) lets several trials share a GPU, for
            models too small to fill one; each needs its part of the GPU's memory, which nobody
            enforces.
        data: who reads and augments. "worker": threads of each worker. "ray": a pool of data actors
            for each worker, on any node. "auto": a pool where it can pay (`decided`). Rows that are
            streamed are always read by tasks of Ray Data, and only "worker" is refused for them.
        data_cpus: data actors of each worker, with one CPU each; None: as many as CPUs are free, at
            most 4.
    """

    num_workers: int | tuple[int, int] = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    data: Literal["auto", "ray", "worker"] = "auto"
    data_cpus: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check(self.most <= MAX_WORKERS, "num_workers", self.num_workers, f"at most {MAX_WORKERS}")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            value = getattr(self, name)
            check(value <= MAX_WORKERS, name, value, f"a finite number, at most {MAX_WORKERS}")
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"num_workers is {self.num_workers}; expected at least 1, or (least, most) in this order."
            )
        if self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ValueError(
                f"a worker asks for {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs; expected more than 0 and at "
                "least 0."
            )
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g}; expected a whole number, or a part of one GPU."
            )
        check_range("data_cpus", self.data_cpus, 0 if self.data == "auto" else 1, MAX_WORKERS)
        if self.data == "worker" and self.data_cpus is not None:
            raise ValueError(
                f"data_cpus is {self.data_cpus}, but with data='worker' there are no data actors: leave it out or take 'ray'."
            )
        if 0 < self.gpus_per_worker < 1 and self.num_workers != 1:
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g} with {self.num_workers} workers; workers of one run cannot share a "
                "GPU (NCCL refuses): take one worker, or a whole GPU for each."
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
        has = cluster.reachable()
        if self.concurrent() >= 1:
            self._check_data_fits(has)
            return
        raise ValueError(
            f"{self.least} workers with {self.cpus_per_worker:g} CPUs and "
            f"{self.gpus_per_worker:g} GPUs each do not fit this cluster of {has.cpus:g} CPUs and "
            f"{has.gpus:g} GPUs; lower the number of workers or what each asks for."
        )

    def _check_data_fits(self, has: cluster.Available) -> None:
        needed = self.least * (self.data_cpus or 1)
        free = has.cpus - self.least * self.cpus_per_worker
        if self.data == "ray" and free < needed:
            raise ValueError(
                f"data is 'ray': {self.least} workers with {self.cpus_per_worker:g} CPUs each leave {max(free, 0):g} of this "
                f"cluster's {has.cpus:g} CPUs free, but their data actors need {needed}; take data='worker', lower "
                "cpus_per_worker or data_cpus, or add CPU nodes."
            )

    def concurrent(self) -> int:
        """How many such runs the cluster can hold at once, nodes to come included."""
        workers = max(self.workers_on(cluster.nodes()), self.workers_on(cluster.allowed_nodes()))
        runs = max(workers // self.most, int(workers >= self.least))
        if self.data == "ray":
            each = self.cpus_per_worker + (self.data_cpus or 1)
            runs = min(runs, max(1, _times(cluster.reachable().cpus, self.most * each)))
        return runs

    def decided(self, *, runs: int, reads_storage: bool) -> Placement:
        """The same placement with its number of data actors.

        "auto" takes data actors where CPUs are left beside those of the workers, and where reading
        can hold training up: samples that are read from storage in every epoch, workers with GPUs,
        or a cluster of several nodes. Otherwise the worker's threads take samples from its own
        memory, and a pool would only cost the seconds of its start.

        Args:
            runs: how many such runs are trained at once.
            reads_storage: whether samples are read from storage in every epoch.

        Returns:
            A placement whose `data_cpus` is the number of each worker's data actors, or 0.
        """
        if self.data == "worker":
            return self
        pays = reads_storage or self.gpus_per_worker > 0 or cluster.has_other_nodes()
        num_workers = runs * self.most
        free = int(cluster.reachable().cpus / num_workers - self.cpus_per_worker + 1e-6)
        if self.data == "auto" and not pays:
            return replace(self, data_cpus=0)
        wanted = MAX_DATA_CPUS if self.data_cpus is None else self.data_cpus
        if self.data == "ray":
            return replace(self, data_cpus=self.data_cpus or max(1, min(free, MAX_DATA_CPUS)))
        return replace(self, data_cpus=max(0, min(free, wanted)))

    def workers_on(self, nodes: Iterable[cluster.Available]) -> int:
        """How many workers fit on these nodes; each needs all it asks for on one of them."""
        return sum(self._workers_on(node) for node in nodes)

    def _workers_on(self, has: cluster.Available) -> int:
        fits = _times(has.cpus, self.cpus_per_worker)
        return min(fits, _times(has.gpus, self.gpus_per_worker)) if self.gpus_per_worker else fits


def _times(has: float, part: float) -> int:
    """How often a part goes into what there is; ten tenths make a whole, as Ray counts."""
    return int(has / part + 1e-6)
