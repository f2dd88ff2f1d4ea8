"""One local Ray for all tests here that a process runs: four logical CPUs, the dashboard on (stopped
trials need it)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repmtl_ray.cluster import LOCAL_ENVIRONMENT, PREEMPTION_WATCHER

os.environ.update(LOCAL_ENVIRONMENT)
os.environ.update(
    {PREEMPTION_WATCHER: "0"},  # as where `cluster.connect` starts a Ray
    # Processes that have imported much wait for the next test's tasks; others would import it again.
    RAY_idle_worker_killing_time_threshold_ms="60000",
    RAY_num_workers_soft_limit="8",
    RAY_AUTH_MODE="disabled",
    RAY_ADDRESS="local",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    OMP_NUM_THREADS="1",
    AWS_ACCESS_KEY_ID="testing",  # of the tests' own S3 server
    AWS_SECRET_ACCESS_KEY="testing",
)

import ray

from repmtl_ray.config import Experiment
from tests.helpers.s3 import S3, serving
from tests.helpers.training import float64_experiment


@pytest.fixture(scope="session")
def scenes_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rendered scenes of the tests, apart from the user's; set before Ray starts its processes."""
    cache = tmp_path_factory.mktemp("scenes")
    before = os.environ.get("REPMTL_RAY_CACHE")
    os.environ["REPMTL_RAY_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["REPMTL_RAY_CACHE"]
    else:
        os.environ["REPMTL_RAY_CACHE"] = before


@pytest.fixture(scope="session")
def spilling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Ray puts what its object store has no room for."""
    return tmp_path_factory.mktemp("spilling")


@pytest.fixture
def spilled(spilling: Path) -> Callable[[], bool]:
    """Whether Ray has put anything there since the test began."""
    before = _changes(spilling)
    return lambda: _changes(spilling) != before


def _changes(folder: Path) -> dict[Path, int]:
    """When a file was last added to a folder or removed."""
    return {part: part.stat().st_mtime_ns for part in (folder, *folder.rglob("*")) if part.is_dir()}


@pytest.fixture(scope="module", autouse=True)
def ray_cluster(scenes_cache: Path, spilling: Path) -> None:
    """The Ray of this process, which the first test starts."""
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            log_to_driver=False,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=200 * 2**20,
            object_spilling_directory=str(spilling),
        )


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as server:
        yield server


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends Ray after the last test that needs it: its idle processes cost the other tests time."""
    if nextitem is None or not nextitem.nodeid.startswith("tests/ray/"):
        ray.shutdown()


@pytest.fixture
def experiment() -> Experiment:
    """As `float64_experiment`."""
    return float64_experiment()
