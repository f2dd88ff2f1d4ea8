"""`fit` on real Ray Train workers: results do not depend on their number, nor on one being killed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import faults
from repmtl_ray import Placement, fit, train
from repmtl_ray.config import Experiment, replace
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.train import FitResult
from tests.helpers.leftovers import leftovers
from tests.helpers.local_mode import fit_here

pytestmark = pytest.mark.ray


def weights(result: Any) -> Tensor:
    state = checkpoint.read_state(result.checkpoint)["model"]
    return torch.cat([tensor.reshape(-1).double() for tensor in state.values()])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(storage: Path, request: pytest.FixtureRequest) -> Any:
    """Two workers, never interrupted."""
    from tests.helpers.training import float64_experiment

    experiment = float64_experiment()
    return fit(
        experiment,
        placement=Placement(num_workers=2),
        storage=storage,
        name="undisturbed",
        checkpoints=CheckpointConfig(every_steps=2, keep=9),
    )


def test_the_history_has_every_epoch_with_named_metrics(undisturbed: FitResult) -> None:
    assert [metrics["epoch"] for metrics in undisturbed.history] == [1, 2, 3]
    assert undisturbed.metrics == undisturbed.history[-1]
    wanted = {
        "segmentation/miou",
        "segmentation/pixel_accuracy",
        "depth/abs_error",
        "depth/rel_error",
    }
    assert wanted <= set(undisturbed.metrics)
    assert {"rep_mtl/tsr", "rep_mtl/csa", "segmentation/train_loss"} <= set(undisturbed.metrics)


def test_a_run_leaves_nothing_in_the_cluster_and_gives_ctrl_c_back(undisturbed: FitResult) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not leftovers()


def test_the_checkpoint_holds_all_and_names_its_experiment(
    undisturbed: FitResult, experiment: Experiment
) -> None:
    state = checkpoint.read_state(undisturbed.checkpoint)
    assert set(state) == {"format", "progress", "model", "optimizer", "scheduler", "policy"}
    assert state["progress"]["epochs_done"] == 3
    assert state["progress"]["global_step"] == 12
    assert checkpoint.read_experiment(undisturbed.checkpoint) == experiment


def test_one_worker_goes_on_with_the_same_result_where_two_had_been(
    undisturbed: FitResult, experiment: Experiment, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an elastic run does when a node goes: the global batch stays. One worker is this
    process."""
    fit_here(monkeypatch)
    earlier = next(iter(storage.glob("undisturbed/checkpoint_000001_00000002_*")))
    shutil.copytree(earlier, storage / "alone" / earlier.name)
    alone = fit(experiment, placement=Placement(num_workers=1), storage=storage, name="alone")
    assert alone.epochs_now == 2
    torch.testing.assert_close(weights(alone), weights(undisturbed), rtol=1e-6, atol=1e-9)
    for name, value in undisturbed.metrics.items():
        assert alone.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.slow
def test_a_run_struck_by_many_faults_is_the_undisturbed_one(
    undisturbed: FitResult, experiment: Experiment, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form of bench/survival.py: a worker dies as it starts, while it writes a checkpoint,
    and after the newest checkpoint was torn; its disk is full in the end."""
    planned: list[dict[str, Any]] = [
        {"kind": "start-up", "rank": 1, "at": None},
        {"kind": "checkpoint", "rank": 0, "at": 4},
        {"kind": "torn checkpoint", "rank": 0, "at": 6},
        {"kind": "full disk", "rank": 0, "at": 11},
    ]
    faults.plan_faults(storage / "struck", planned)
    monkeypatch.setattr(train, "run_worker", faults.worker)

    def go() -> Any:
        return fit(
            experiment,
            placement=Placement(num_workers=2),
            storage=storage,
            name="struck",
            max_failures=4,
            checkpoints=CheckpointConfig(every_steps=1),
        )

    with pytest.raises(ValueError, match=r"writing .* failed 5 times.*File too large.*same name"):
        go()
    result = go()
    events = faults.events_of(storage / "struck")
    struck = [event["event"] for event in events if event["event"] not in faults.WORK]
    assert sorted(struck) == sorted(fault["kind"] for fault in planned)
    steps = [event["at"] for event in events if event["event"] == "step"]
    assert set(steps) == set(range(1, 13))
    assert len(steps) <= 12 + 1 + 2 + 2, "a torn checkpoint costs one step more than a kill"
    assert result.history == undisturbed.history
    assert torch.equal(weights(result), weights(undisturbed))


def test_the_name_of_a_finished_run_returns_its_result(
    undisturbed: FitResult, experiment: Experiment, storage: Path
) -> None:
    again = fit(experiment, placement=Placement(num_workers=2), storage=storage, name="undisturbed")
    assert again.epochs_now == 0
    assert again.history == undisturbed.history


def test_the_name_of_another_experiments_run_is_refused(
    undisturbed: FitResult, experiment: Experiment, storage: Path
) -> None:
    other = replace(experiment, {"regularizer.lambda_tsr": 0.1})
    with pytest.raises(
        ValueError, match=r"undisturbed.*another experiment.*regularizer.lambda_tsr was 0.9, is 0.1"
    ):
        fit(other, storage=storage, name="undisturbed")


@pytest.mark.parametrize(
    ("overrides", "placement", "message"),
    [
        (
            {"batch_size": 8},
            Placement(num_workers=8),
            "8 workers with 1 CPUs .* do not fit this cluster of 4 CPUs",
        ),
        (
            {},
            Placement(gpus_per_worker=1),
            "1 GPUs each do not fit this cluster of 4 CPUs and 0 GPUs",
        ),
        (
            {"batch_size": 5},
            Placement(num_workers=2),
            "batch_size is 5 over 2 workers.*take 4 or 6",
        ),
        ({"model.encoder": "resnet5O"}, Placement(), "did you mean.*resnet50"),
        ({"model.pretrained": True}, Placement(), "model.weights"),
        ({"policy.name": "Nash"}, Placement(), "did you mean"),
        ({"tasks": ["depth"]}, Placement(), "policy 'stl'"),
        ({"tasks": ["flow"]}, Placement(), "'flow' is not a task of cityscapes"),
        ({"data.path": "/nowhere"}, Placement(), "/nowhere"),
        ({"batch_size": 64}, Placement(), "batch_size"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    experiment: Experiment,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    placement: Placement,
    message: str,
) -> None:
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.setattr(train, "read_samples", lambda *_: pytest.fail("samples were read"))
    with pytest.raises(ValueError, match=message):
        fit(replace(experiment, overrides), placement=placement, storage=storage, name="refused")
    assert not (storage / "refused").exists()
