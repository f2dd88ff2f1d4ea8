"""What Tune's searchers and schedulers know goes on after the death of a search's driver and its Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import faults
from tests.helpers.paths import ROOT
from tests.helpers.quick_search import EPOCHS, TRIALS, searched

pytestmark = pytest.mark.ray


def epochs_of(folder: Path) -> dict[str, list[int]]:
    """By trial, the epochs it reported."""
    return {
        file.parent.name: [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        for file in folder.glob("search/*/result.json")
    }


def ended(folder: Path) -> set[str]:
    """Names of the trials that did all their epochs."""
    return {name for name, epochs in epochs_of(folder).items() if epochs[-1:] == [EPOCHS]}


def snapshot_time(folder: Path) -> float:
    """When Tune last noted what the search knows."""
    files = folder.glob("search/experiment_state-*.json")
    return max((file.stat().st_mtime for file in files), default=0.0)


def rungs(folder: Path) -> dict[str, float]:
    """By trial, what ASHA knows of the first epoch."""
    file = folder / "asha.json"
    return json.loads(file.read_text())["rungs"]["1"] if file.exists() else {}


# An interrupted trial reports an epoch again, and Optuna keeps the first value of a step.
@pytest.mark.filterwarnings("ignore:The reported value is ignored:UserWarning")
def test_optuna_and_asha_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.quick_search", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    seen: float | None = None  # when it had gone far enough
    while seen is None or snapshot_time(tmp_path) < seen:
        assert driver.poll() is None, "the search ended before it could be interrupted"
        assert time.monotonic() < deadline, "the search does not go on"
        if seen is None and len(rungs(tmp_path)) >= 4 and ended(tmp_path):
            seen = time.time()
        time.sleep(0.05)
    faults.kill_with_children(driver.pid)
    driver.wait()
    before, known = epochs_of(tmp_path), rungs(tmp_path)
    done = ended(tmp_path)
    assert len(before) < TRIALS, "too late to show anything"

    grid, study = searched(str(tmp_path), resume=True)
    results = [grid[index] for index in range(len(grid))]

    assert len(results) == TRIALS
    assert [result.error for result in results] == [None] * TRIALS
    after = epochs_of(tmp_path)
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    assert len(rungs(tmp_path)) == TRIALS
    assert known.items() <= rungs(tmp_path).items(), "ASHA forgot what it had seen"
    asked = [trial.params["x"] for trial in study.trials if trial.state.is_finished()]
    assert sorted(asked) == sorted(result.config["x"] for result in results), "Optuna forgot"
