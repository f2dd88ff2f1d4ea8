"""What Tune's searchers and schedulers know goes on after the death of a search's driver and its Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ray._quick_search import EPOCHS, TRIALS, searched

pytestmark = pytest.mark.ray


def epochs_of(folder: Path) -> dict[str, list[int]]:
    """By trial, the epochs it reported."""
    return {
        file.parent.name: [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
        for file in folder.glob("search/*/result.json")
    }


def rungs(folder: Path) -> dict[str, float]:
    """By trial, what ASHA knows of the first epoch."""
    file = folder / "asha.json"
    return json.loads(file.read_text())["rungs"]["1"] if file.exists() else {}


# An interrupted trial reports an epoch again, and Optuna keeps the first value of a step.
@pytest.mark.filterwarnings("ignore:The reported value is ignored:UserWarning")
@pytest.mark.timeout(600)
def test_optuna_and_asha_go_on_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.ray._quick_search", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(rungs(tmp_path)) < 4 and time.monotonic() < deadline:
        assert driver.poll() is None, "the search ended before it could be interrupted"
        time.sleep(0.05)
    time.sleep(1.5)  # three of Tune's snapshots
    processes = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in processes:
        process.kill()
    driver.wait()
    before, known = epochs_of(tmp_path), rungs(tmp_path)
    ended = {name for name, epochs in before.items() if epochs[-1:] == [EPOCHS]}
    assert ended
    assert len(before) < TRIALS, "too late to show anything"

    results, study = searched(str(tmp_path), resume=True)

    assert len(results) == TRIALS
    assert [result.error for result in results] == [None] * TRIALS
    after = epochs_of(tmp_path)
    assert {name: after[name] for name in ended} == {name: before[name] for name in ended}
    assert len(rungs(tmp_path)) == TRIALS
    assert known.items() <= rungs(tmp_path).items(), "ASHA forgot what it had seen"
    asked = [trial.params["x"] for trial in study.trials if trial.state.is_finished()]
    assert sorted(asked) == sorted(result.config["x"] for result in results), "Optuna forgot"
