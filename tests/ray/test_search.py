"""`tune` on a real Ray: table, baselines, failed trials, early stopping, and going on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
from ray import tune as ray_tune

from bench import faults
from repmtl_ray import Placement, cluster, tune
from repmtl_ray.config import Experiment, replace, to_dict
from repmtl_ray.search import SearchResult
from repmtl_ray.studies.stored import stored_study
from tests.helpers.leftovers import leftovers
from tests.helpers.other_ray import another_ray

pytestmark = pytest.mark.ray
TSR, RATE, POLICY = "regularizer.lambda_tsr", "optimizer.learning_rate", "policy.name"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture
def short(experiment: Experiment) -> Any:
    return replace(experiment, {"epochs": 2, "precision": "float32"})


SPACE = {RATE: ray_tune.grid_search([0.01, 1e30]), TSR: 0.5, "regularizer.temperature": 0.3}


@pytest.fixture(scope="module")
def undisturbed(storage: Path) -> Any:
    """A grid of two trials, of which one diverges."""
    from tests.helpers.training import float64_experiment

    short = replace(float64_experiment(), {"epochs": 2, "precision": "float32"})
    return tune(
        short, SPACE, num_samples=1, max_concurrent=1, storage=str(storage), name="grid"
    )  # one process, which the next run takes over


def test_a_search_ranks_trials_and_goes_on_when_one_fails(
    short: Experiment, undisturbed: SearchResult
) -> None:
    found = undisturbed
    table = found.table
    assert list(table["rank"]) == [1, 2]
    assert list(table["status"]) == ["done", "failed"]
    assert table["lambda_tsr"].tolist() == [0.5, 0.5]
    assert table["tau"].tolist() == [0.3, 0.3]
    assert "with policy 'EW'" in table["error"][1]
    assert table["error"][0] == ""
    assert set(found.baseline) >= {"segmentation/miou", "depth/abs_error"}
    assert found.best == replace(short, {RATE: 0.01, TSR: 0.5, "regularizer.temperature": 0.3})
    row = table.iloc[0]
    relative = [
        (row["segmentation/miou"] / found.baseline["segmentation/miou"] - 1) / 2
        + (row["segmentation/pixel_accuracy"] / found.baseline["segmentation/pixel_accuracy"] - 1)
        / 2,
        -(row["depth/abs_error"] / found.baseline["depth/abs_error"] - 1) / 2
        - (row["depth/rel_error"] / found.baseline["depth/rel_error"] - 1) / 2,
    ]
    assert row["delta_p_task"] == pytest.approx(50 * sum(relative), rel=1e-6)


def test_a_search_is_read_back_from_its_records(undisturbed: SearchResult) -> None:
    found = stored_study(undisturbed.directory)
    assert isinstance(found, SearchResult)
    assert (found.best, found.baseline) == (undisturbed.best, undisturbed.baseline)
    assert [*found.histories.values()] == [*undisturbed.histories.values()]
    own = ["trial", "config"]  # the order of the draws, and the form of what changed
    pandas.testing.assert_frame_equal(
        found.table.drop(columns=own), undisturbed.table.drop(columns=own)
    )
    assert "with policy 'EW'" in found.table["error"][1], "the failed one, with its reason"


@pytest.mark.slow
def test_early_stopping_leaves_nothing_behind(
    short: Experiment, storage: Path, undisturbed: SearchResult
) -> None:
    """Not even where the machine has another Ray, whose actors Ray Train's cleaner could take for
    its own. After the other search: its single-task rows are this one's too."""
    with another_ray():
        found = tune(
            short,
            {RATE: ray_tune.grid_search([0.02, 1e-6, 1e-7])},
            num_samples=1,
            scheduler="asha",
            max_concurrent=1,
            storage=str(storage),
            name="asha",
        )
        assert not leftovers()
    assert set(found.table["status"]) == {"done", "stopped"}
    assert found.table["status"][0] == "done"
    assert (found.table.loc[found.table["status"] == "stopped", "epoch"] == 1).all()


SEARCH = """
import json, sys
from ray import tune as ray_tune
from repmtl_ray import tune
from repmtl_ray.config import Experiment, from_dict

experiment = from_dict(Experiment, json.loads(sys.argv[1]))
space = {
    "optimizer.learning_rate": ray_tune.grid_search([0.01, 1e30]),
    "regularizer.lambda_tsr": 0.5,
    "regularizer.temperature": 0.3,
}
tune(experiment, space, num_samples=1, max_concurrent=1, storage=sys.argv[2], name="interrupted")
"""


def finished_runs(directory: Path) -> dict[str, float]:
    """Last checkpoints of trials that did all their epochs, with the time they were written."""
    return {
        path.parent.name: path.stat().st_mtime
        for path in directory.glob("runs/*/checkpoint_000002_00000000_*/complete.json")
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # two searches, one in a process of its own, on whatever machine
def test_a_search_goes_on_after_its_driver_and_its_ray_died(
    short: Experiment, storage: Path, undisturbed: SearchResult
) -> None:
    """Killed as soon as the first trial has ended, when Tune may not have noted it yet."""
    directory = storage / "interrupted"
    driver = subprocess.Popen(
        [sys.executable, "-c", SEARCH, json.dumps(to_dict(short)), str(storage)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while not finished_runs(directory) and time.monotonic() < deadline:
        assert driver.poll() is None, "the search ended before it could be interrupted"
        time.sleep(0.05)
    faults.kill_with_children(driver.pid)
    driver.wait()
    before = finished_runs(directory)
    assert len(before) == 1
    found = tune(short, SPACE, num_samples=1, storage=str(storage), name="interrupted", resume=True)
    assert finished_runs(directory) == before, "the finished trial did not run again"
    own = ["checkpoint", "trial"]
    pandas.testing.assert_frame_equal(
        found.table.drop(columns=own), undisturbed.table.drop(columns=own)
    )


def test_early_stopping_without_a_dashboard_is_refused(
    short: Experiment, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.has_dashboard()
    monkeypatch.setattr(cluster, "has_dashboard", lambda: False)
    with pytest.raises(ValueError, match=r"no dashboard.*--include-dashboard=true"):
        tune(
            replace(short, {"batch_size": 4}),
            {TSR: 1.0},
            scheduler="asha",
            storage=str(storage),
            placement=Placement(num_workers=2),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"param_space": {POLICY: ray_tune.choice(["EW", "UWW"])}},
            r"'policy.name' may become 'UWW'.*did you mean",
        ),
        ({"param_space": {"regularizer.lamda": 1.0}}, "did you mean"),
        ({"param_space": {TSR: ray_tune.grid_search([1.0])}, "searcher": "optuna"}, "is a grid"),
        ({"param_space": {TSR: 1.0}, "resume": True, "name": "never"}, "there is no search at"),
        (
            {"param_space": {TSR: 1.0}, "name": "grid"},
            "exists already; give another name, or resume",
        ),
        ({"param_space": {TSR: 1.0}, "resume": True}, "resume needs the name"),
        ({"param_space": {TSR: 1.0}, "num_samples": 0}, "num_samples is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    short: Experiment, storage: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(short, storage=str(storage), **arguments)
