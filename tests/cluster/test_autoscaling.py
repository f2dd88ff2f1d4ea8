"""From no worker to some and back, with Ray's own autoscaler over fake nodes: a search that waits
makes nodes appear, its trials spread, a lost node's trial goes on elsewhere, idle nodes go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_cluster import (
    CPU_NODE,
    ENVIRONMENT,
    EPOCHS,
    GPU_NODE,
    epochs_of,
    fake_cluster,
    wait_until,
)
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_a_search_grows_the_cluster_survives_a_lost_node_and_leaves_nothing_running(
    tmp_path: Path,
) -> None:
    storage, log = tmp_path / "storage", tmp_path / "driver.log"
    environment = {**ENVIRONMENT, "REPMTL_RAY_CACHE": str(tmp_path / "scenes")}
    types = {"cpu_worker": CPU_NODE, "gpu_worker": GPU_NODE}
    with fake_cluster(types, idle_s=8, environment=environment) as cluster:
        assert cluster.workers() == set()
        command = [
            sys.executable,
            "-m",
            "tests.helpers.cluster_search",
            str(storage),
            "2",
            str(EPOCHS),
        ]
        with log.open("w") as output:
            driver = subprocess.Popen(
                command,
                cwd=ROOT,
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        def both_train() -> bool:
            cluster.check_alive()
            assert driver.poll() is None, log.read_text()
            reported = [len(trial) for trial in epochs_of(storage)]
            return len(cluster.training_on()) == 2 and max(reported, default=0) >= 3

        try:
            wait_until(both_train, 240, "the trials do not spread over two nodes", log)
            assert max(len(trial) for trial in epochs_of(storage)) < EPOCHS, "too late to lose it"
            cluster.kill(min(cluster.training_on()))
            assert driver.wait(timeout=300) == 0, log.read_text()
            wait_until(lambda: cluster.workers() == set(), 60, "idle nodes stay", cluster.log)
        finally:
            driver.kill()
            driver.wait()
    printed = log.read_text()
    assert "1 nodes with 0 CPUs and 0 GPUs, which may grow to 4 CPUs and 2 GPUs" in printed
    assert not any("gpu_worker" in line for line in printed.splitlines()), printed
    reported = epochs_of(storage)
    assert [trial[-1] for trial in reported] == [EPOCHS, EPOCHS]
    assert [trial.count(1) for trial in reported] == [1, 1], "went on, did not start again"
    assert printed.count("done") >= 2, printed
