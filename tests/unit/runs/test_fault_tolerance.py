"""What the workers of a run agree on, with Ray's own parts replaced; and ASHA after an interruption."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune.schedulers import TrialScheduler

from repmtl_ray import cluster, storage
from repmtl_ray.cluster import Available
from repmtl_ray.collectives import Workers
from repmtl_ray.config import DataConfig, Experiment, ExperimentError, PolicyConfig
from repmtl_ray.placement import Placement
from repmtl_ray.runs import fault_tolerance
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.runs.fault_tolerance import FaultTolerance, is_out_of_memory
from repmtl_ray.search.asha import ResumableASHA
from tests.helpers.stored_runs import SmallSnapshot, places, small_contents

NEVER = CheckpointConfig(every_minutes=None)


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Ray has told this process of preemption; broadcasts go to oneself."""
    told = SimpleNamespace(preemption_info=None)
    context = SimpleNamespace(preemption_context=told)
    monkeypatch.setattr(
        "ray.train.v2._internal.execution.context.get_train_context", lambda: context
    )
    monkeypatch.setattr(fault_tolerance, "broadcast_from_rank_zero", lambda found: found)
    return told


def step_of(guard_: Any, step: Any) -> None:
    guard_.after_step(SmallSnapshot(small_contents(0, step, step=step)))


def test_after_a_notice_every_step_is_saved_until_the_node_goes(
    tmp_path: Path, notice: Any
) -> None:
    kept = FaultTolerance(str(tmp_path), NEVER, Workers())
    step_of(kept, 1)
    assert not tmp_path.exists() or places(tmp_path) == []
    notice.preemption_info = SimpleNamespace(deadline_ms=1000 * (time.time() + 60))
    for step in (2, 3, 4):
        step_of(kept, step)
        assert places(tmp_path)[-1] == (0, step)
    kept._notice_ends = time.time() - 1
    step_of(kept, 5)
    assert places(tmp_path)[-1] == (0, 4)


def test_only_the_first_worker_writes(tmp_path: Path, notice: Any) -> None:
    notice.preemption_info = SimpleNamespace(deadline_ms=None)
    step_of(FaultTolerance(str(tmp_path), NEVER, Workers(rank=1, size=2)), 1)
    assert places(tmp_path) == []
    step_of(FaultTolerance(str(tmp_path), NEVER, Workers(rank=0, size=2)), 1)
    assert places(tmp_path) == [(0, 1)]


def test_a_storage_that_fails_is_left_alone_until_the_epoch_ends_the_run(
    tmp_path: Path, notice: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = FaultTolerance(str(tmp_path), CheckpointConfig(every_steps=1), Workers())
    tries = []

    def full(location: str, data: bytes) -> None:
        tries.append(location)
        raise storage.StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        for step in (1, 2, 3):
            step_of(kept, step)
        assert len(tries) == 1
        assert "no checkpoint at step 1: the disk is full" in caplog.text
        with pytest.raises(ExperimentError, match="the disk is full"):
            kept.after_epoch(SmallSnapshot(small_contents(1)))
    kept.after_epoch(SmallSnapshot(small_contents(1)))
    assert places(tmp_path) == [(1, 0)]


def test_out_of_memory_on_one_worker_is_what_all_of_the_next_attempt_end_with(
    tmp_path: Path, notice: Any
) -> None:
    experiment = Experiment(data=DataConfig(name="cityscapes"))
    kept = FaultTolerance(str(tmp_path), NEVER, Workers(rank=1, size=2))
    kept.out_of_memory(torch.OutOfMemoryError("Tried to allocate 20 GiB\nmore"), experiment)
    with pytest.raises(ExperimentError, match=r"batch_size 64 over 2 workers \(Tried.*20 GiB\)"):
        FaultTolerance(str(tmp_path), NEVER, Workers(rank=0, size=2)).start()
    assert FaultTolerance(str(tmp_path), NEVER, Workers(rank=0, size=2)).start() is None, (
        "told once"
    )


def test_an_error_of_the_users_code_ends_a_run_and_others_may_be_tried_again(
    tmp_path: Path, notice: Any
) -> None:
    experiment = Experiment(data=DataConfig(name="cityscapes"))
    kept = FaultTolerance(str(tmp_path), NEVER, Workers(rank=1, size=2))

    def fault_of(function: Callable[[], Any]) -> str | None:
        with pytest.raises(Exception) as caught:
            function()
        return kept.fault_of(caught.value, experiment)

    assert fault_of(lambda: PolicyConfig(name="no policy")) is None, "not from the user's code"
    assert fault_of(lambda: (tmp_path / "no file").read_bytes()) is None
    told = r"^your code failed: IndexError: index .*\(test_fault_tolerance\.py, line .*\)\.$"
    assert re.match(told, fault_of(lambda: torch.zeros(2)[2]) or "")
    with pytest.raises(ExperimentError, match=told):
        FaultTolerance(str(tmp_path), NEVER, Workers(rank=0, size=2)).start()


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    ("num_workers", "cpus", "runs"), [((1, 2), 1, 1), ((1, 2), 5, 2), ((2, 3), 1, 0), (2, 5, 2)]
)
def test_an_elastic_run_needs_its_least_and_takes_its_most(
    monkeypatch: pytest.MonkeyPatch, num_workers: tuple[int, ...] | int, cpus: int, runs: int
) -> None:
    has = Available(cpus, 0)
    monkeypatch.setattr("repmtl_ray.cluster.nodes", lambda: [has])
    monkeypatch.setattr("repmtl_ray.cluster.available", lambda: has)
    monkeypatch.setattr("repmtl_ray.cluster.reachable", lambda: has)
    assert Placement(num_workers=num_workers).concurrent() == runs


def named(name: str) -> SimpleNamespace:
    """A trial, as far as ASHA looks at it."""
    return SimpleNamespace(config={"run": SimpleNamespace(name=name)})


def scheduler(path: Path, brackets: int = 1) -> Any:
    made = ResumableASHA(
        str(path),
        time_attr="epoch",
        max_t=9,
        grace_period=2,
        reduction_factor=2,
        brackets=brackets,
        metric="m",
        mode="max",
    )
    for name in "abcd":
        made.on_trial_add(None, named(name))
    return made


def decisions(made: Any, reports: Any) -> list[Any]:
    return [
        made.on_trial_result(None, named(name), {"epoch": epoch, "m": value})
        for name, epoch, value in reports
    ]


@pytest.mark.parametrize(("brackets", "num_stopped"), [(1, 3), (2, 1)])
def test_asha_and_hyperband_go_on_where_they_were(
    brackets: int, num_stopped: int, tmp_path: Path
) -> None:
    """Interrupted after any report, its decisions are those of the scheduler that never was."""
    reports = [("a", 2, 0.9), ("b", 2, 0.1), ("c", 2, 0.95), ("a", 4, 0.8), ("d", 2, 0.5)]
    reports += [("c", 4, 0.2)]
    expected = decisions(scheduler(tmp_path / "unbroken.json", brackets), reports)
    assert expected.count(TrialScheduler.STOP) == num_stopped
    for cut in range(len(reports) + 1):
        path = tmp_path / f"{cut}.json"
        first = decisions(scheduler(path, brackets), reports[:cut])
        resumed = scheduler(path, brackets)
        assert first + decisions(resumed, reports[cut:]) == expected
    stopped = reports[expected.index(TrialScheduler.STOP)][0]
    again = decisions(scheduler(path, brackets), [(stopped, 5, 1.0)])
    assert again == [TrialScheduler.STOP], "a trial that was stopped stays so"


def test_a_ray_started_here_listens_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setenv("RAY_ADDRESS", "local")
    for name in cluster.LOCAL_ENVIRONMENT:
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setenv(cluster.PREEMPTION_WATCHER, "1")
    monkeypatch.delenv(cluster.PREEMPTION_WATCHER)
    cluster.connect()
    assert os.environ[cluster.PREEMPTION_WATCHER] == "0", "nobody takes this machine away"
    assert (given["include_dashboard"], given["dashboard_host"]) == (True, "127.0.0.1")


def test_a_cluster_that_is_joined_later_has_its_watcher_of_preemptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(cluster, "_check_address", lambda wanted: None)
    monkeypatch.setattr(cluster, "_described", lambda: "10.0.0.1")
    monkeypatch.setattr(cluster, "_started_here", False)
    for name in (*cluster.LOCAL_ENVIRONMENT, cluster.PREEMPTION_WATCHER, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    for chosen_by_user in (False, True):
        monkeypatch.setenv(cluster.PREEMPTION_WATCHER, "0")
        if not chosen_by_user:
            monkeypatch.delenv(cluster.PREEMPTION_WATCHER)
        for address in ("local", "10.0.0.1:6379"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            cluster.connect()
        assert (cluster.PREEMPTION_WATCHER in os.environ) == chosen_by_user
