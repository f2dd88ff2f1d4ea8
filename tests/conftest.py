"""Fixtures shared by all tests: pools of real gloo workers; GPU tests skip without a device.

Run on several processes (`pytest -n 2 --dist loadgroup`, as `make test` does), tests that share a
Ray or the gloo workers stay together on one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit._gloo import Pool


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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ("ray", "cluster"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif "pool_of" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("gloo"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
