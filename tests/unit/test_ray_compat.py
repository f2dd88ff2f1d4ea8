"""The private names of Ray: that only one module uses them, and that they are what it takes them for."""

from __future__ import annotations

import ast
import inspect
import os
import re
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.data
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.tune.schedulers import ASHAScheduler

from repmtl_ray import ray_compat
from tests.helpers.paths import ROOT

PRIVATE = re.compile(r"^ray\b.*(\._|\.core\.generated|\.autoscaler\.)|^ray\.train\.v2\b")
SOURCES = [
    path
    for folder in ("repmtl_ray", "pipelines", "search_spaces", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "ray_compat.py"
]


def imports_at_run_time(path: Path) -> set[str]:
    """Modules with the names that are imported from them, without those for type checkers alone."""
    tree = ast.parse(path.read_text())
    for_types = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_other_module_imports_a_private_name_of_ray() -> None:
    private = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES
        if (names := sorted(filter(PRIVATE.search, imports_at_run_time(path))))
    }
    assert SOURCES
    assert not private, f"use repmtl_ray/ray_compat.py instead of {private}"


@pytest.mark.parametrize(
    "name",
    [
        "ray._private.state.state",
        "ray.train.v2._internal.constants.X",
        "ray.core.generated.gcs_pb2.X",
        "ray.autoscaler.v2.sdk.X",
    ],
)
def test_private_names_are_recognised(name: str) -> None:
    assert PRIVATE.search(name)
    assert not PRIVATE.search("ray.train.torch.TorchTrainer")


def entries() -> list[str]:
    functions = inspect.getmembers(ray_compat, inspect.isfunction)
    return [name for name, value in functions if value.__module__ == ray_compat.__name__]


@pytest.mark.parametrize("name", entries())
def test_every_entry_says_why_it_exists_what_is_known_upstream_and_when_it_can_go(
    name: str,
) -> None:
    text = " ".join((getattr(ray_compat, name).__doc__ or "").split())
    assert "Why" in text
    assert "pstream" in text
    assert "It can go" in text


def test_the_dashboards_address_is_what_ray_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_DASHBOARD_URL", "http://127.0.0.1:8265")
    assert ray_compat.dashboard_url() == "127.0.0.1:8265"


def test_signal_handlers_are_the_same_after_the_block_and_untouched_in_other_threads() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def own(number: int, frame: object) -> None:
        raise AssertionError("no signal is sent")

    before = [signal.signal(number, own) for number in numbers]
    try:
        with ray_compat.signal_handlers_kept():
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
        assert [signal.getsignal(number) for number in numbers] == [own] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    entered = []

    def in_a_thread() -> None:
        with ray_compat.signal_handlers_kept():
            entered.append(True)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert entered == [True]


def test_ray_trains_fit_registers_its_handler_by_the_method_that_is_replaced() -> None:
    source = inspect.getsource(DataParallelTrainer)
    assert "self._register_sigint_handler(" in source
    trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    ray_compat.leave_interrupts_to_caller(trainer)
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(None)  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("before", [None, "10.0.0.1:6379"])
def test_a_runs_processes_get_the_address_and_this_process_keeps_its_own(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.v2._internal import constants

    context = SimpleNamespace(gcs_address="127.0.0.1:1234")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", set(constants.ENV_VARS_TO_PROPAGATE))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if before:
        monkeypatch.setenv("RAY_ADDRESS", before)
    with ray_compat.address_known_to_run():
        assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1234"
        assert "RAY_ADDRESS" in constants.ENV_VARS_TO_PROPAGATE
    assert os.environ.get("RAY_ADDRESS") == before


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (None, None),
        (SimpleNamespace(deadline_ms=2500), ray_compat.PreemptionNotice(2.5)),
        (SimpleNamespace(deadline_ms=0), ray_compat.PreemptionNotice(None)),
    ],
)
def test_a_notice_of_preemption_is_what_ray_gave_to_this_process(
    info: SimpleNamespace | None,
    expected: ray_compat.PreemptionNotice | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=info))
    monkeypatch.setattr(
        "ray.train.v2._internal.execution.context.get_train_context", lambda: context
    )
    assert ray_compat.preemption_notice() == expected


def test_the_rungs_of_asha_are_the_schedulers_own() -> None:
    scheduler = ASHAScheduler(
        time_attr="epoch", metric="m", mode="max", max_t=9, grace_period=1, reduction_factor=3
    )
    (rungs,) = ray_compat.asha_rungs(scheduler)
    assert [milestone for milestone, _ in rungs] == [9, 3, 1]
    rungs[-1][1]["trial"] = 0.5
    assert ray_compat.asha_rungs(scheduler)[0][-1][1] == {"trial": 0.5}


def test_ray_data_still_warns_of_its_own_settings() -> None:
    """When this fails, `data_context_warnings_ignored` can go."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ray.data.DataContext()
    assert [warning for warning in caught if warning.category is DeprecationWarning]
    with ray_compat.data_context_warnings_ignored():
        ray.data.DataContext()


def test_the_address_of_a_running_cluster_is_the_one_that_the_file_of_its_head_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own file, which a head that is killed leaves behind."""
    from ray._private import services, utils

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", list)
    file = Path(utils.get_ray_address_file(str(tmp_path)))
    monkeypatch.setattr(utils, "get_ray_address_file", lambda temp_dir: str(file))
    assert ray_compat.address_of_running_cluster() is None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("10.0.0.7:6379")
    assert ray_compat.address_of_running_cluster() == "10.0.0.7:6379"
