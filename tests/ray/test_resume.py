"""What Optuna and ASHA know goes on after the death of a search's driver and its Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import faults
from repmtl_ray import search
from repmtl_ray.search import trial
from tests.helpers.quick_search import NAME, TRIALS, searched

pytestmark = pytest.mark.ray


def records(folder: Path) -> dict[str, int]:
    """By run, when the record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("records/*.json")}


def rungs(folder: Path) -> dict[str, float]:
    """By run, what ASHA knows of the first epoch."""
    file = folder / "asha.json"
    return json.loads(file.read_text())["rungs"]["1"] if file.exists() else {}


def drawn(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "drawn.json").read_text())


@pytest.mark.slow
def test_optuna_and_asha_continue_where_they_were_and_more_samples_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (search, "prepare_run"),
        (search, "read_samples"),
        (search, "train_baseline"),
        (trial, "InProcessTrial"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back after the test
    folder = tmp_path / NAME
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.quick_search", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while len(rungs(folder)) < 4 or not records(folder):
        assert driver.poll() is None, "the search ended before it could be interrupted"
        assert time.monotonic() < deadline, "the search does not go on"
        time.sleep(0.05)
    faults.kill_with_children(driver.pid)
    driver.wait()
    before, known, earlier = records(folder), rungs(folder), drawn(folder)
    assert len(earlier) < TRIALS, "too late to show anything"

    result = searched(str(tmp_path), resume=True, num_samples=TRIALS + 1)

    assert len(result.table) == TRIALS + 1
    assert set(result.table["error"]) == {""}
    after = records(folder)
    assert {name: after[name] for name in before} == before, "a finished run was trained again"
    assert known.items() <= rungs(folder).items(), "ASHA forgot what it had seen"
    assert drawn(folder)[: len(earlier)] == earlier, "Optuna forgot"
    assert len({json.dumps(draw) for draw in drawn(folder)}) == TRIALS + 1
