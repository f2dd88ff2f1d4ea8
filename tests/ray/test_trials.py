"""Trials whose runs train in the trial's own process: reused, killed, stopped; the result is the same."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from repmtl_ray.config import Experiment, replace
from repmtl_ray.placement import Placement
from repmtl_ray.prepared_run import prepare_run, read_samples
from repmtl_ray.runs.worker import CachedData
from repmtl_ray.search.run_records import Record, Run
from repmtl_ray.search.study import Study, train_missing

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data() -> CachedData:
    from tests.helpers.training import float64_experiment

    return read_samples(prepare_run(float64_experiment()))


def trained(
    experiments: list[Experiment], data: CachedData, folder: Path
) -> tuple[dict[str, Record], dict[str, str]]:
    """The records and the failures of runs that are trained one after the other."""
    runs = [
        Run(name=f"run-{number}", label=f"run {number}", experiment=experiment)
        for number, experiment in enumerate(experiments)
    ]
    study = Study.of(
        "search",
        str(folder),
        experiments[0],
        data,
        placement=Placement(),
        max_concurrent=1,
        epochs=experiments[0].epochs,
    )
    return train_missing(study, runs, folder=str(folder))


def owner(folder: Path) -> int:
    """The process that trains a run."""
    pid: int = json.loads((folder / "lock.json").read_text())["pid"]
    return pid


class Killer(threading.Thread):
    """Kills the process of a run when its first epoch is stored."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.killed = 0

    def run(self) -> None:
        deadline = time.monotonic() + 200
        while not list(self.folder.glob("checkpoint_000001_00000000_*/complete.json")):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        self.killed = owner(self.folder)
        os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_trial_goes_on_and_a_diverged_one_leaves_its_process_to_the_next(
    experiment: Experiment,
    data: CachedData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    longer = replace(experiment, {"epochs": 6})
    wild = replace(longer, {"optimizer.learning_rate": 1e30})
    other = replace(longer, {"seed": 1})
    expected, _ = trained([other, longer], data, tmp_path / "undisturbed")
    killer = Killer(tmp_path / "disturbed/runs/run-0")
    killer.start()
    records, failures = trained([longer, wild, other], data, tmp_path / "disturbed")
    killer.join()
    assert killer.killed
    assert records["run-0"]["history"] == expected["run-1"]["history"]
    assert records["run-2"]["history"] == expected["run-0"]["history"]
    assert list(failures) == ["run-1"]
    assert "with policy 'EW'" in failures["run-1"]
    printed = capsys.readouterr().out
    assert "worker 0 of run run-0 was lost at step" in printed
    assert "the run continues from checkpoint_00000" in printed
    assert "Traceback" not in printed
