"""Joining or starting Ray, and what the cluster has.

Owns the settings that Ray 2.60 needs for our runs not to hang, the check that a request fits, and
what is said of a cluster that cannot be joined or does not grow. Imports Ray, nothing of torch.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

from repmtl_ray import ray_compat

logger = logging.getLogger(__name__)

GROUP_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # at most one report is seen in an interval; the default is 2 s
    GROUP_START_TIMEOUT: "120",  # a trial that waits for its turn longer counts as failed
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # of a notice that a node goes; the default is 5 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_worker_maximum_startup_concurrency": "8",  # else warnings about every trial's few processes
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # three screens for a process that died; the table has it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C raises KeyboardInterrupt (run_lock.Interrupted)
    "NO_ALBUMENTATIONS_UPDATE": "1",
    # Every execution of `ray.data.read_parquet`, so every epoch of streamed rows, starts so many processes
    # that read the files' footers. With 32, the default, a small machine needs longer for this than to read.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}
"""Set where the user has not: Ray reads them in the driver and passes them on."""


HEAD = "node:__internal_head__"
CLUSTER_FILE = "REPMTL_RAY_CLUSTER_FILE"
REACH_S = 5.0
"""A head that does not take a connection for so long is out of reach."""
FAILURE_SHOWN_S = 600.0
"""For how long a machine that could not be started is spoken of."""


_started_here = False
_left_out_watcher = False


def connect(*, num_cpus: int | None = None) -> None:
    """Joins the Ray cluster that RAY_ADDRESS names or this machine is part of, or starts a local
    one.

    Does nothing if this process is connected already. RAY_ADDRESS=local always starts one. A cluster
    of this machine whose head was killed leaves its address behind; it is passed over, which is said.

    Args:
        num_cpus: logical CPUs of a cluster started here; None takes the machine's.

    Raises:
        ValueError: the cluster that RAY_ADDRESS names does not answer, or runs another Ray or
            Python.

    A local cluster gets the dashboard (on loopback): without its HTTP server, Ray 2.60 never cleans
    up after a trial that Tune stops early, and the next one waits for ever (Ray issue 54305).
    """
    user_set = set(os.environ)
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    with ray_compat.signal_handlers_kept():
        _connect(num_cpus, user_set)


def _connect(num_cpus: int | None, user_set: set[str]) -> None:
    global _started_here, _left_out_watcher
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    wanted = os.environ.get("RAY_ADDRESS", "auto")
    _check_address(wanted)
    if wanted == "auto" and _head_has_ended():
        wanted = "local"
    try:
        if wanted == "local":
            raise ConnectionError("a local Ray was asked for")
        ray.init(address=wanted, **quiet)
        if _left_out_watcher:  # by an earlier call, for a Ray on this machine alone
            os.environ.pop(PREEMPTION_WATCHER, None)
            _left_out_watcher = False
        if GROUP_START_TIMEOUT not in user_set:
            os.environ[GROUP_START_TIMEOUT] = "900"  # an autoscaler's nodes take minutes to come
        print(f"joined the Ray cluster at {_described()}", flush=True)
    except ConnectionError as error:
        if wanted not in ("auto", "local"):
            raise _unreachable(wanted, str(error)) from error
        if PREEMPTION_WATCHER not in os.environ:
            # Nobody takes this machine away, and the watcher is one more process for every run.
            os.environ[PREEMPTION_WATCHER] = "0"
            _left_out_watcher = True
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            **quiet,
        )
        _started_here = True
        print(f"started a local Ray with {available().cpus:g} CPUs", flush=True)
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise ValueError(
            f"the cluster at {wanted} runs other versions than this process: "
            f"{' '.join(str(error).split())} Run the recipe on the cluster (`ray submit`, `ray job submit`), or "
            "install its versions here."
        ) from error


def has_dashboard() -> bool:
    """Whether the cluster's head serves the dashboard, which Ray's own processes ask what is alive."""
    return bool(ray_compat.dashboard_url())


def _check_address(wanted: str) -> None:
    """Finds in a second what Ray would try for a minute."""
    if wanted in ("auto", "local"):
        return
    if "://" in wanted:
        raise ValueError(
            f"RAY_ADDRESS is {wanted}; a recipe joins a cluster from one of its machines (RAY_ADDRESS=auto or host:port). From "
            "outside: `ray submit ray_cluster.yaml pipelines/...` or `ray job submit`."
        )
    host, _, port = wanted.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"RAY_ADDRESS is {wanted}; expected auto, local or host:port.")
    failure = _connection_failure(wanted)
    if failure:
        raise _unreachable(wanted, failure)


def _connection_failure(address: str) -> str:
    """Why nothing can be reached at host:port, in the system's words; empty if something can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        return str(error)
    return ""


def _head_has_ended() -> bool:
    """Whether this machine has the address of a cluster that does not answer; prints a line then."""
    address = ray_compat.address_of_running_cluster()
    failure = _connection_failure(address) if address else ""
    if failure:
        print(
            f"the Ray cluster that this machine was part of, at {address}, does not answer ({failure}); this "
            "run starts a local Ray (`ray stop` forgets the address)",
            flush=True,
        )
    return bool(failure)


def _unreachable(wanted: str, found: str) -> ValueError:
    return ValueError(
        f"no Ray cluster answers at RAY_ADDRESS={wanted} ({' '.join(found.split())}); start it (`ray up "
        "ray_cluster.yaml`), correct the address, or unset RAY_ADDRESS to run on this machine."
    )


def _described() -> str:
    has, can = available(), reachable()
    text = f"{ray.get_runtime_context().gcs_address}: {len(nodes())} nodes with {has}"
    return f"{text}, which may grow to {can}" if can != has else text


@dataclass(frozen=True)
class Available:
    """What all nodes have together, in use or not."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def available() -> Available:
    resources = ray.cluster_resources()
    return Available(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _total(nodes: Iterable[Available]) -> Available:
    nodes = list(nodes)
    return Available(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))


def nodes() -> list[Available]:
    """What each node has."""
    return [_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _of(resources: Any) -> Available:
    return Available(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))


def allowed_nodes() -> list[Available]:
    """What each node would have once an autoscaler has added all that its file allows; none where
    no such file is known.

    Ray 2.60 tells nobody what its autoscaler may add (it has the call, `report_cluster_config`, and
    never makes it), so the file is read that `ray up` leaves on the head, or the one that
    REPMTL_RAY_CLUSTER_FILE names.
    """
    file = _cluster_file()
    if file is None:
        return []
    kinds = file["available_node_types"]
    added = [
        _of(kind["resources"])
        for name, kind in kinds.items()
        if name != file.get("head_node_type") and kind.get("resources")
        for _ in range(kind.get("max_workers", file.get("max_workers", 0)))
    ]
    if not added:
        return []
    # Of all types together at most max_workers come; those with GPUs are the dear ones, and asked for.
    added = sorted(added, key=lambda node: (-node.gpus, -node.cpus))
    added = added[: file.get("max_workers", len(added))]
    heads = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [_of(head) for head in heads if HEAD in head] + added


def _cluster_file() -> Any:
    """The cluster file of the cluster that this process is connected to, if it has one."""
    named = os.environ.get(CLUSTER_FILE)
    path = Path(named).expanduser() if named else Path.home() / "ray_bootstrap_config.yaml"
    if not path.is_file():
        if named:
            raise ValueError(f"{CLUSTER_FILE} is {named}, which is no file; correct or unset it.")
        return None
    if not named and not _on_its_head():
        return None
    try:
        file = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f"{path} is no readable cluster file: {error}") from error
    if not isinstance(file, dict) or "available_node_types" not in file:
        raise ValueError(f"{path} is no cluster file of Ray's: it has no available_node_types.")
    return file


def _on_its_head() -> bool:
    """Whether this process runs on the head of a cluster that it has not started itself."""
    here = ray.util.get_node_ip_address()
    head = [node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]
    return not _started_here and any(node["NodeManagerAddress"] == here for node in head)


def reachable() -> Available:
    """What the nodes have together, or would have once an autoscaler has added all it may."""
    has, grown = available(), _total(allowed_nodes())
    return Available(max(has.cpus, grown.cpus), max(has.gpus, grown.gpus))


def has_other_nodes() -> bool:
    """Whether workers may be on another node than this process, now or later."""
    return len(nodes()) > 1 or bool(allowed_nodes())


def address_of(node: str) -> str:
    """The network address of a node, by its id."""
    found = [entry["NodeManagerAddress"] for entry in ray.nodes() if entry["NodeID"] == node]
    return found[0] if found else node


DATA_ACTOR = "MapWorker(MapBatches(_SigningActor))"
"""The class of the processes of `data.ray_pipeline`, as Ray Data names it."""


def data_actors() -> str:
    """Where the data actors of this job are, in words; empty if there are none, or one node alone."""
    if len(ray.nodes()) == 1:
        return ""
    counts = Counter(ray_compat.live_actors(DATA_ACTOR).values())
    return ", ".join(
        f"{count} data actor{'s' * (count > 1)} on node {node[:8]} ({address_of(node)})"
        for node, count in sorted(counts.items())
    )


def waiting_for() -> str:
    """What the autoscaler is waiting for, or could not get, in words; empty if nothing."""
    status = ray_compat.autoscaler_status()
    coming: dict[str, int] = {}
    for launch in status.pending_launches:
        kind = launch.ray_node_type_name
        coming[kind] = coming.get(kind, 0) + launch.count
    for node in status.pending_nodes:
        coming[node.ray_node_type_name] = coming.get(node.ray_node_type_name, 0) + 1
    said = [f"waiting for {count} {kind}" for kind, count in coming.items()]
    failed = {
        launch.ray_node_type_name: " ".join(str(launch.details).split())[:300]
        for launch in status.failed_launches
        if time.time() - (launch.failed_ts_s or 0) < FAILURE_SHOWN_S
    }
    said += [
        f"{kind} could not be started: {details} (quota, capacity or rights: docs/cluster.md)"
        for kind, details in failed.items()
    ]
    return "; ".join(said)
