"""Fixtures shared by all tests: pools of real gloo workers; GPU tests skip without a device.

Run on several processes (`pytest -n 2 --no-loadscope-reorder`, as `make test` does), the tests that
start Ray come first, in two groups of about equal length with a Ray each; then each process takes
the next file as soon as it is free, the longest first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",  # tensors are small, and the other process needs the other core
    RAY_raylet_start_wait_time_s="180",  # 30 by default, which a busy machine exceeds
    RAY_worker_niceness="0",  # 15 by default: the other process's tests would always go first
)

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.gloo import Pool


@pytest.fixture(scope="session")
def pool_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Pool]]:
    """`pool_of(size)` gives the session's pool of that many gloo workers."""
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size, str(tmp_path_factory.mktemp("gloo") / f"rendezvous-{size}"))
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


RUNS = ("fit", "placement_group_cleanup", "resume", "search", "tune_reporting")
LONGEST = (
    "tests/unit/test_session.py",
    "tests/cluster/test_autoscaling.py",
    "tests/cluster/test_data_nodes.py",
    "tests/cluster/test_elastic.py",
    "tests/unit/test_wrong_inputs.py",
    "tests/unit/runs/test_programs.py",
    "tests/unit/runs/test_loggers.py",
    "tests/unit/runs/test_workers.py",
)
"""Files that a process should not be left with in the end."""


def scope_of(nodeid: str) -> str:
    """The group of tests that stay on one process: a file, or the files that share a Ray."""
    file = nodeid.partition("::")[0]
    if not file.startswith("tests/ray/"):
        return file
    name = file.removeprefix("tests/ray/test_").removesuffix(".py")
    return "runs on Ray" if name in RUNS else "data and studies on Ray"


def place_of(nodeid: str) -> tuple[int, str]:
    """Where a test comes in the order."""
    scope = scope_of(nodeid)
    if scope.endswith("on Ray"):
        return 0, scope
    return (1 + LONGEST.index(scope), "") if scope in LONGEST else (1 + len(LONGEST), "")


class _OneScopeAtATime(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    # Not marks of groups: pytest-xdist 3.8 writes them into ids that pytest 9.2 does not read.
    return _OneScopeAtATime(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place_of(item.nodeid))
    for item in items:
        if "ray" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))  # a dozen processes start, however busy it is
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
