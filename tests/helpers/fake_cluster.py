"""A cluster on one machine that grows and shrinks as Ray's autoscaler decides, over Ray's fake nodes
(real raylets).

Ray's own helper for this lacks a file in the wheel, and stops every Ray of the machine; this one
knows what it started and ends only that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RpcError

from tests.helpers.paths import ROOT

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed in 5 s
    "RAY_health_check_initial_delay_ms": "1000",
}
CPU_NODE = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "max_workers": 2}
GPU_NODE = {"resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}, "max_workers": 2}
EPOCHS = 50
COMMANDS = (
    *("initialization", "setup", "head_setup", "worker_setup"),
    *("head_start_ray", "worker_start_ray"),
)
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


TRAINING = ("ray::RayTrainWorker", "ray::ResourceTrainable")
"""Of processes: a worker of Ray Train, and a trial that trains in its own process."""


class FakeCluster:
    """A head without CPUs whose autoscaler adds nodes of the given types.

    Args:
        types: by name, {"resources": {...}, "max_workers": n}.
        idle_s: seconds until an idle node goes.
        environment: of all its processes.
    """

    def __init__(
        self, types: dict[str, dict[str, Any]], *, idle_s: float, environment: dict[str, str]
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fake", dir="/tmp"))  # sockets want short paths
        port, client_port, agent_port = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "fake",
            "max_workers": sum(kind["max_workers"] for kind in types.values()),
            "upscaling_speed": 10,
            "idle_timeout_minutes": idle_s / 60,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{kind}_commands": [] for kind in COMMANDS},
            "provider": {
                # Not "fake_multinode", whose defaults are the file that the wheel lacks.
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": head,
                **{
                    name: {"node_config": {}, "min_workers": 0, **kind}
                    for name, kind in types.items()
                },
            },
        }
        file = self.folder / "cluster.json"
        file.write_text(json.dumps(config))
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": str(self.folder),
            "RAY_ADDRESS": self.address,
            "REPMTL_RAY_CLUSTER_FILE": str(file),  # as the one that `ray up` leaves on a head
            **environment,
        }
        started = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            NODE_ID: FAKE_HEAD_NODE_ID,
        }
        without = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        self.log = self.folder / "head.log"
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
            *(
                f"--port={port}",
                f"--ray-client-server-port={client_port}",
                f"--dashboard-agent-listen-port={agent_port}",
                "--node-ip-address=127.0.0.1",
            ),
            *("--num-cpus=0", "--object-store-memory=100000000", "--include-dashboard=false"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--autoscaling-config={file}"),
        ]
        with self.log.open("w") as log:
            self.head = subprocess.Popen(
                command, env=without | started, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(self._answers, 180, "the head does not answer", self.log)

    def _answers(self) -> bool:
        self.check_alive()
        try:
            return len(self.nodes()) == 1
        except (RpcError, RuntimeError):  # not yet
            return False

    def check_alive(self) -> None:
        assert self.head.poll() is None, self.log.read_text()

    def nodes(self) -> set[str]:
        """Ids of the nodes that are up, the head's included."""
        status = get_cluster_status(self.address)
        return {str(node.node_id) for node in [*status.active_nodes, *status.idle_nodes]}

    def workers(self) -> set[str]:
        return self.nodes() - {FAKE_HEAD_NODE_ID}

    def _raylets(self) -> dict[str, psutil.Process]:
        """By node id."""
        found = {}
        for process in psutil.Process(self.head.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    found[process.environ().get(NODE_ID, "")] = process
        return found

    def training_on(self) -> set[str]:
        """Ids of the nodes that train at this moment."""
        found = set()
        for node, raylet in self._raylets().items():
            with contextlib.suppress(psutil.Error):
                titles = [" ".join(child.cmdline()) for child in raylet.children()]
                if any(title.startswith(TRAINING) for title in titles):
                    found.add(node)
        return found

    def kill(self, node: str) -> None:
        """As a spot machine goes that nobody announced."""
        self._raylets()[node].kill()

    def stop(self) -> None:
        processes = [*psutil.Process(self.head.pid).children(recursive=True)]
        self.head.terminate()
        processes += (
            psutil.Process(self.head.pid).children(recursive=True)
            if self.head.poll() is None
            else []
        )
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.head.wait(timeout=10)
        self.head.kill()
        self.head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def fake_cluster(
    types: dict[str, dict[str, Any]], *, idle_s: float, environment: dict[str, str]
) -> Iterator[FakeCluster]:
    cluster = FakeCluster(types, idle_s=idle_s, environment=environment)
    try:
        yield cluster
    finally:
        cluster.stop()


def wait_until(
    holds: Callable[[], bool], seconds: float, message: str, log: Path | None = None
) -> None:
    """Looks ten times in a second; fails with the message and the end of the log."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            end = log.read_text()[-3000:] if log is not None and log.exists() else ""
            raise AssertionError(f"{message} within {seconds} s\n{end}")
        time.sleep(0.1)


def epochs_of(storage: Path) -> list[list[int]]:
    """Of every trial, the epochs that it reported so far, in their order."""
    return [
        [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        for file in sorted((storage / "grown").glob("search*/*/result.json"))
    ]
