"""A pipeline of data actors makes CPU nodes come, goes on when one is lost, and leaves none behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data_nodes import readers
from tests.helpers.fake_cluster import CPU_NODE, ENVIRONMENT, fake_cluster, wait_until
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_data_nodes_come_for_a_pipeline_and_a_lost_one_changes_no_batch(tmp_path: Path) -> None:
    log, folder = tmp_path / "driver.log", tmp_path / "read"
    folder.mkdir()
    with fake_cluster({"data_node": CPU_NODE}, idle_s=5, environment=ENVIRONMENT) as cluster:
        assert cluster.workers() == set()
        with log.open("w") as output:
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.data_nodes", str(folder), "40"],
                cwd=ROOT,
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:

            def reads() -> bool:
                cluster.check_alive()
                assert driver.poll() is None, log.read_text()
                return bool(set(readers(folder)) & cluster.workers())

            wait_until(reads, 200, "no data node comes", log)
            (lost,) = set(readers(folder)) & cluster.workers()
            cluster.kill(lost)
            assert driver.wait(timeout=250) == 0, log.read_text()
            wait_until(lambda: cluster.workers() == set(), 60, "idle nodes stay", cluster.log)
        finally:
            driver.kill()
            driver.wait()
    assert "240 equal batches" in log.read_text()
    assert readers(folder)[-1] != lost, "another node read the rest"
