"""Signals to real recipes with a real Ray: they stop, say how to continue, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from repmtl_ray.config import Experiment, replace, to_dict
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.ray
SMALL = ["--num-train", 8, "--num-val", 4]
STOPS_WITHIN_S = 10.0


class Recipe:
    """A recipe that runs in a process of its own."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.words = [str(argument) for argument in arguments]
        self.output, self.errors = folder / "output.txt", folder / "errors.txt"
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
                stdout=output,
                stderr=errors,
            )

    def wait_for(self, pattern: str, folder: Path) -> None:
        deadline = time.monotonic() + 240
        while not list(folder.glob(pattern)):
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def stop(self, *numbers: signal.Signals) -> str:
        """Sends signals, and returns what the recipe printed to stderr."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        assert children, "Ray did not run yet"
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.2)
        # The machine may be busy; a recipe that ignores the signal takes far longer.
        self.process.wait(timeout=3 * STOPS_WITHIN_S)
        _, alive = psutil.wait_procs(children, timeout=STOPS_WITHIN_S)
        assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
        assert self.process.returncode == 130
        return self.errors.read_text()


def status_of(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["status"]


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_to_continue(tmp_path: Path, experiment: Experiment) -> None:
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(to_dict(replace(experiment, {"epochs": 2000}))))
    recipe = Recipe(tmp_path, "pipelines/train.py", file, "--storage", tmp_path)
    recipe.wait_for("fit-*/checkpoint_*/complete.json", tmp_path)
    errors = recipe.stop(signal.SIGTERM)
    (run,) = tmp_path.glob("fit-*")
    assert recipe.output.read_text().startswith(f"run {run.name} in {tmp_path}\n")
    assert f"interrupted (SIGTERM): the run is in {run}" in errors
    assert errors.strip().endswith(shlex.join(["python", *recipe.words, "--name", run.name]))
    assert "Traceback" not in errors
    assert status_of(run) == "interrupted"
    assert not (run / "lock.json").exists()


@pytest.mark.slow
def test_a_search_that_is_stopped_twice_leaves_earlier_results_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    (out / "best.json").write_text("of an earlier search")
    options = ["--epochs", 2000, "--height", 32, "--width", 64, "--storage", tmp_path, "--out", out]
    recipe = Recipe(tmp_path, "pipelines/tune_cityscapes.py", *options, *SMALL, "--name", "stopped")
    recipe.wait_for("baselines/runs/*/checkpoint_*/complete.json", tmp_path)
    errors = recipe.stop(signal.SIGINT, signal.SIGINT)
    assert errors.strip().endswith("--resume stopped")
    assert status_of(tmp_path / "stopped") == "interrupted"
    assert [path.name for path in out.iterdir()] == ["best.json"]
    assert (out / "best.json").read_text() == "of an earlier search"


@pytest.mark.slow
def test_a_benchmark_that_is_stopped_is_resumed_by_the_printed_command(tmp_path: Path) -> None:
    small = ["--set", "data.height=32", "--set", "data.width=64", "--set", "data.num_train=8"]
    options = ["--methods", "EW", "--seeds", 1, "--epochs", 2000, "--batch-size", 4, *small]
    places = ["--storage", tmp_path, "--out", tmp_path / "results", "--name", "stopped"]
    recipe = Recipe(tmp_path, "pipelines/benchmark.py", "scenes", *options, *places)
    recipe.wait_for("baselines/runs/*/checkpoint_*/complete.json", tmp_path)
    errors = recipe.stop(signal.SIGINT)
    assert errors.strip().endswith("--resume stopped")
    assert status_of(tmp_path / "stopped") == "interrupted"
    assert not (tmp_path / "stopped/lock.json").exists()


@pytest.mark.slow
def test_a_preparation_that_is_stopped_is_continued_by_the_same_command(tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["pipelines/prepare_data.py", "cityscapes", "--out", store, "--splits", "train"]
    scenes = ["--set", "num_train=200", "--set", "num_val=1", "--height", 32, "--width", 64]
    recipe = Recipe(tmp_path, *command, *scenes)
    recipe.wait_for("store/.prepared/lock.json", tmp_path)
    while not psutil.Process(recipe.process.pid).children():
        time.sleep(0.1)
    errors = recipe.stop(signal.SIGHUP)
    assert errors.strip().endswith(shlex.join(["python", *recipe.words]))
    assert status_of(store / ".prepared") == "interrupted"
    assert not (store / "manifest.json").exists()
