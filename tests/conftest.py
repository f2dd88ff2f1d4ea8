"""Fixtures shared by all tests: pools of real gloo workers; GPU tests skip without a device.

Run on several processes (`pytest -n 2 --no-loadscope-reorder`, as `make test` does), the tests that
share a Ray stay together on one of them, and the files of the others share the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",  # tensors are small, and the other process needs the other core
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


class _RayOnOneProcess(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file.startswith("tests/ray/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    # Not marks of groups: pytest-xdist 3.8 writes them into ids that pytest 9.2 does not read.
    return _RayOnOneProcess(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest scope first: no process is left with it in the end.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/ray/"))
    for item in items:
        if "ray" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))  # a dozen processes start, however busy it is
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
