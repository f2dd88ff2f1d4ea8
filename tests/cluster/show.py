"""The long form of `test_autoscaling.py`, to look at: six trials on up to three nodes, one of which
is lost, and what there is whenever it changes.

    python -m tests.cluster.show
"""

from __future__ import annotations

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.fake_cluster import CPU_NODE, ENVIRONMENT, epochs_of, fake_cluster
from tests.helpers.paths import ROOT

TRIALS, EPOCHS, LOST_AT = 6, 40, 5


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    storage, log = folder / "storage", folder / "driver.log"
    environment = {**ENVIRONMENT, "REPMTL_RAY_CACHE": str(folder / "scenes")}
    types = {"cpu_worker": {**CPU_NODE, "max_workers": 3}}
    with fake_cluster(types, idle_s=8, environment=environment) as cluster:
        start, lost, shown = time.monotonic(), "", ""
        command = [sys.executable, "-m", "tests.helpers.cluster_search"]
        with log.open("w") as output:
            driver = subprocess.Popen(
                [*command, str(storage), str(TRIALS), str(EPOCHS)],
                cwd=ROOT,
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            while driver.poll() is None or cluster.workers():
                cluster.check_alive()
                trials = epochs_of(storage)
                training = cluster.training_on()
                now = (
                    f"nodes {sorted(int(node[-5:]) for node in cluster.workers())}  training on "
                    f"{sorted(int(node[-5:]) for node in training)}  trials ended "
                    f"{sum(bool(trial) and trial[-1] == EPOCHS for trial in trials)}"
                )
                if now != shown:
                    print(f"[{time.monotonic() - start:5.0f} s] {now}", flush=True)
                    shown = now
                if not lost and training and any(len(trial) >= LOST_AT for trial in trials):
                    lost = min(training)
                    cluster.kill(lost)
                    print(f"[{time.monotonic() - start:5.0f} s] node {int(lost[-5:])} is killed")
                time.sleep(0.5)
        finally:
            driver.kill()
            driver.wait()
    print(f"\nepochs reported by each trial: {[len(trial) for trial in epochs_of(storage)]}")
    print(log.read_text())


if __name__ == "__main__":
    main()
