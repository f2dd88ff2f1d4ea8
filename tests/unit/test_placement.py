"""Where runs go, on lists of nodes: GPU runs on GPU nodes, whole workers on one node, shared GPUs,
nodes to come; and addresses that cannot be joined."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from repmtl_ray import cluster, ray_compat
from repmtl_ray.cluster import Available
from repmtl_ray.placement import Placement
from tests.helpers.paths import ROOT

HEAD = Available(0, 0)
GPU_NODE = Available(8, 1)
CPU_NODE = Available(16, 0)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`nodes(up, allowed)`: a cluster with these nodes, and with those once it has grown."""

    def pretend(up: Any, allowed: tuple[()] = ()) -> None:
        monkeypatch.setattr(cluster, "nodes", lambda: list(up))
        monkeypatch.setattr(cluster, "allowed_nodes", lambda: list(allowed))
        total = cluster._total(up)
        monkeypatch.setattr(cluster, "available", lambda: total)

    return pretend


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0; expected at least 1"),
        ({"cpus_per_worker": 0}, "asks for 0 CPUs and 0 GPUs; expected more than 0"),
        ({"cpus_per_worker": -1}, "asks for -1 CPUs"),
        ({"gpus_per_worker": -0.5}, "1 CPUs and -0.5 GPUs"),
    ],
)
def test_impossible_placements_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**values)


@pytest.mark.parametrize(
    ("placement", "up", "runs"),
    [
        (Placement(), [(2, 0)], 2),
        (Placement(num_workers=2), [(5, 0)], 2),
        (Placement(num_workers=2), [(1, 0), (2, 0), (1, 0)], 2),
        (Placement(cpus_per_worker=0.5), [(2, 0)], 4),
        (Placement(cpus_per_worker=2), [(3, 0), (3, 0)], 2),
        (Placement(gpus_per_worker=1), [(8, 3)], 3),
        (Placement(gpus_per_worker=1), [(8, 0), (1, 2)], 1),
        (Placement(num_workers=(1, 3)), [(2, 0)], 1),
    ],
)
def test_as_many_runs_at_once_as_have_room(
    nodes: Callable[..., Any], placement: Placement, up: list[tuple[int, ...]], runs: int
) -> None:
    nodes([Available(*node) for node in up])
    assert placement.concurrent() == runs
    placement.check_fits()


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(num_workers=5), "5 workers with 1 CPUs .* this cluster of 4 CPUs and 0 GPUs"),
        (Placement(cpus_per_worker=3), "1 workers with 3 CPUs .* this cluster of 4 CPUs"),
        (Placement(gpus_per_worker=1), "1 CPUs and 1 GPUs each .* 4 CPUs and 0 GPUs"),
    ],
    ids=["workers", "a node's CPUs", "GPUs"],
)
def test_what_the_cluster_can_never_hold_is_refused_with_what_there_is(
    nodes: Callable[..., Any], placement: Placement, message: str
) -> None:
    nodes([Available(2, 0), Available(2, 0)])
    with pytest.raises(ValueError, match=message):
        placement.check_fits()


def test_gpu_runs_find_no_room_on_cpu_nodes(nodes: Callable[..., Any]) -> None:
    nodes([HEAD, CPU_NODE, GPU_NODE])
    assert Placement(gpus_per_worker=1, cpus_per_worker=4).concurrent() == 1
    nodes([HEAD, CPU_NODE])
    with pytest.raises(ValueError, match="do not fit this cluster of 16 CPUs and 0 GPUs"):
        Placement(gpus_per_worker=1).check_fits()


def test_a_reserved_head_takes_no_worker(nodes: Callable[..., Any]) -> None:
    nodes([HEAD])
    with pytest.raises(ValueError, match="do not fit this cluster of 0 CPUs"):
        Placement().check_fits()


def test_nodes_to_come_count_before_they_are_there(nodes: Callable[..., Any]) -> None:
    nodes([HEAD], [HEAD, *[GPU_NODE] * 8, *[CPU_NODE] * 2])
    assert Placement(gpus_per_worker=1, cpus_per_worker=4).concurrent() == 8
    assert Placement(num_workers=4, gpus_per_worker=1, cpus_per_worker=4).concurrent() == 2
    assert Placement(cpus_per_worker=4).concurrent() == 8 * 2 + 2 * 4


def test_a_worker_that_no_single_node_can_hold_does_not_fit(nodes: Callable[..., Any]) -> None:
    """The CPUs of one node and the GPU of another are no place for it."""
    nodes([HEAD], [HEAD, GPU_NODE, CPU_NODE])
    with pytest.raises(ValueError, match="1 workers with 16 CPUs and 1 GPUs each do not fit"):
        Placement(gpus_per_worker=1, cpus_per_worker=16).check_fits()


@pytest.mark.parametrize(("part", "runs"), [(0.5, 2), (0.25, 4), (0.2, 5), (0.1, 8), (0.3, 3)])
def test_parts_of_a_gpu_let_several_runs_share_it(
    nodes: Callable[..., Any], part: float, runs: int
) -> None:
    """0.1: the node's 8 CPUs are the limit."""
    nodes([GPU_NODE])
    assert Placement(gpus_per_worker=part).concurrent() == runs


def test_ten_tenths_are_a_whole(nodes: Callable[..., Any]) -> None:
    nodes([Available(16, 1)])
    assert Placement(gpus_per_worker=0.1).concurrent() == 10  # 1 // 0.1 is 9


def test_workers_of_one_run_cannot_share_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"0\.5 with 2 workers; workers of one run cannot share"):
        Placement(num_workers=2, gpus_per_worker=0.5)


def test_more_than_one_gpu_is_a_whole_number() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_worker is 1\.5; expected a whole number"):
        Placement(gpus_per_worker=1.5)


CLOSED = "a closed port"


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "from outside: `ray submit"),
        ("http://127.0.0.1:8265", "from outside: `ray submit"),
        ("somewhere", "expected auto, local or host:port"),
        (CLOSED, "no Ray cluster answers at RAY_ADDRESS=127.0.0.1"),
    ],
)
def test_an_address_that_cannot_be_joined_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv(
        "RAY_ADDRESS", f"127.0.0.1:{closed_port()}" if address == CLOSED else address
    )
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=f"(?i){message}"):
        cluster.connect()


def test_a_cluster_whose_head_was_killed_is_passed_over_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ray.init` would try for minutes to reach the address that the head has left behind."""
    joined: list[str] = []
    left_behind = f"127.0.0.1:{closed_port()}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_started_here", False)
    monkeypatch.setattr(ray_compat, "address_of_running_cluster", lambda: left_behind)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: joined.append(address))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    cluster.connect()
    assert joined == ["local"]
    printed = capsys.readouterr().out.splitlines()
    assert f"at {left_behind}, does not answer" in printed[0]
    assert printed[1] == "started a local Ray with 2 CPUs"


def test_what_the_autoscaler_could_not_get_is_said_with_the_clouds_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.autoscaler.v2 import sdk
    from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

    now = int(time.time())
    state = LaunchRequest.Status
    old = now - 2 * int(cluster.FAILURE_SHOWN_S)
    status = ClusterStatus(
        pending_launches=[LaunchRequest("", "gpu_worker", 2, state.PENDING, now)],
        pending_nodes=[NodeInfo("", "gpu_worker", "i-1", "10.0.0.7")],
        failed_launches=[
            LaunchRequest("", "gpu_worker", 1, state.FAILED, now, now, "VcpuLimitExceeded:\n 0"),
            LaunchRequest("", "cpu_worker", 1, state.FAILED, old, old, "of yesterday"),
        ],
    )
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(sdk, "get_cluster_status", lambda address: status)
    said = cluster.waiting_for()
    assert said.startswith("waiting for 3 gpu_worker; gpu_worker could not be started: VcpuLimit")
    assert "of yesterday" not in said
    assert "docs/cluster.md" in said


@pytest.fixture
def of_the_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs, alone, whose cluster file is ray_cluster.yaml."""
    head = {"Alive": True, "Resources": {"memory": 1.0, cluster.HEAD: 1.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [head])
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {})
    monkeypatch.setenv(cluster.CLUSTER_FILE, str(ROOT / "ray_cluster.yaml"))


def test_on_a_cluster_that_is_at_zero_the_cluster_file_says_what_may_come(
    of_the_cloud: Any,
) -> None:
    """Ray 2.60 itself does not tell, and a search would be refused for want of CPUs."""
    assert cluster.nodes() == [Available(0, 0)]
    assert sorted(map(str, cluster.allowed_nodes())) == sorted(
        map(str, [HEAD, *[GPU_NODE] * 8, *[CPU_NODE] * 2])
    )
    assert cluster.has_other_nodes()
    Placement(gpus_per_worker=1, cpus_per_worker=8).check_fits()
    assert Placement(cpus_per_worker=16).concurrent() == 2


def test_types_together_come_to_no_more_than_max_workers(
    of_the_cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "ray_cluster.yaml").read_text().replace("max_workers: 10 ", "max_workers: 3 ")
    (tmp_path / "smaller.yaml").write_text(text)
    monkeypatch.setenv(cluster.CLUSTER_FILE, str(tmp_path / "smaller.yaml"))
    assert cluster.allowed_nodes() == [HEAD, GPU_NODE, GPU_NODE, GPU_NODE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which is no file"),
        ("a: [", "no readable cluster file"),
        ("a: 1", "no available_node_types"),
    ],
)
def test_a_cluster_file_that_is_none_is_refused(
    of_the_cloud: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / "file.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(cluster.CLUSTER_FILE, str(path))
    with pytest.raises(ValueError, match=message):
        cluster.allowed_nodes()


@pytest.mark.parametrize(
    ("placement", "up", "runs", "reads_storage", "actors"),
    [
        (Placement(), [(8, 0)], 1, False, 0),  # samples in this machine's memory
        (Placement(), [(8, 0)], 1, True, 4),
        (Placement(), [(2, 0)], 1, True, 1),
        (Placement(), [(2, 0)], 2, True, 0),  # two runs at once leave nothing
        (Placement(), [(8, 0)], 2, True, 3),
        (Placement(), [(4, 0), (4, 0)], 1, False, 4),
        (Placement(gpus_per_worker=1, cpus_per_worker=2), [(8, 2)], 2, False, 2),
        (Placement(num_workers=(1, 2)), [(6, 0)], 1, True, 2),
        (Placement(data_cpus=2), [(8, 0)], 1, True, 2),
        (Placement(data="ray"), [(8, 0)], 1, False, 4),
        (Placement(data="ray", data_cpus=6), [(8, 0)], 1, False, 6),
        (Placement(data="worker"), [(8, 0)], 1, True, None),
    ],
)
def test_data_actors_take_what_the_workers_leave(
    nodes: Callable[..., Any],
    placement: Placement,
    up: list[tuple[int, ...]],
    runs: int,
    reads_storage: bool,
    actors: int | None,
) -> None:
    nodes([Available(*node) for node in up])
    decided = placement.decided(runs=runs, reads_storage=reads_storage)
    assert decided.data_cpus == actors
    assert decided.data == placement.data
    again = decided.decided(runs=1, reads_storage=reads_storage)
    assert again == decided, "a trial takes what its search decided"


def test_nodes_that_may_come_count_for_data_actors(nodes: Callable[..., Any]) -> None:
    nodes([HEAD], [GPU_NODE, CPU_NODE])
    placement = Placement(cpus_per_worker=8, gpus_per_worker=1, data="ray", data_cpus=16)
    placement.check_fits()
    with pytest.raises(ValueError, match=r"'ray': 1 workers with 8 CPUs .* leave 16 .* need 17"):
        dataclasses.replace(placement, data_cpus=17).check_fits()


def test_runs_with_data_actors_need_room_for_them(nodes: Callable[..., Any]) -> None:
    nodes([Available(8, 0)])
    assert Placement(data="ray").concurrent() == 4
    assert Placement(data="ray", data_cpus=3).concurrent() == 2
    assert Placement(data="auto").concurrent() == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "rays"}, "data is 'rays'"),
        ({"data": "ray", "data_cpus": 0}, "data_cpus is 0"),
        ({"data_cpus": -1}, "data_cpus is -1"),
        ({"data": "worker", "data_cpus": 2}, "data_cpus is 2, but with data='worker'"),
    ],
)
def test_data_actors_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Placement(**values)
