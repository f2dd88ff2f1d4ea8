"""`fit` on real Ray Train workers: results do not depend on their number, nor on one being killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from repmtl_ray import Placement, checkpoint, fit
from repmtl_ray.config import replace

pytestmark = pytest.mark.ray


def weights(result):
    state = checkpoint.read_state(result.checkpoint)["model"]
    return torch.cat([tensor.reshape(-1).double() for tensor in state.values()])


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(storage, request):
    """Two workers, never interrupted."""
    from tests.ray.conftest import experiment as fixture

    experiment = fixture.__wrapped__()
    return fit(experiment, placement=Placement(num_workers=2), storage=storage, name="undisturbed")


def test_the_history_has_every_epoch_with_named_metrics(undisturbed):
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


def test_the_checkpoint_holds_all_and_names_its_experiment(undisturbed, experiment):
    state = checkpoint.read_state(undisturbed.checkpoint)
    assert set(state) == {"format", "progress", "model", "optimizer", "scheduler", "policy"}
    assert state["progress"]["epochs_done"] == 3
    assert state["progress"]["global_step"] == 12
    assert checkpoint.read_experiment(undisturbed.checkpoint) == experiment


def test_one_worker_gives_the_same_result(undisturbed, experiment, storage):
    alone = fit(experiment, storage=storage, name="alone")
    torch.testing.assert_close(weights(alone), weights(undisturbed), rtol=1e-6, atol=1e-9)
    for name, value in undisturbed.metrics.items():
        assert alone.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def kill_one_worker(directory: Path, killed: list[int]) -> None:
    """Waits for a run's second checkpoint, then ends one of its training processes at once.

    By then Ray has taken note of the first.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(directory.glob("checkpoint_*/state.pt"))) >= 2:
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith("ray::") and "TrainWorker" in title:
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


def test_a_killed_worker_changes_nothing(undisturbed, experiment, storage):
    killed: list[int] = []
    watcher = threading.Thread(
        target=kill_one_worker, args=(storage / "killed", killed), daemon=True
    )
    watcher.start()
    result = fit(experiment, placement=Placement(num_workers=2), storage=storage, name="killed")
    watcher.join()
    assert killed
    assert result.epochs_now < 3, "it went on from a checkpoint"
    assert result.history == undisturbed.history
    assert torch.equal(weights(result), weights(undisturbed))


def test_the_name_of_a_finished_run_returns_its_result(undisturbed, experiment, storage):
    again = fit(experiment, placement=Placement(num_workers=2), storage=storage, name="undisturbed")
    assert again.epochs_now == 0
    assert again.history == undisturbed.history


def test_the_name_of_another_experiments_run_is_refused(undisturbed, experiment, storage):
    other = replace(experiment, {"regularizer.lambda_tsr": 0.1})
    with pytest.raises(
        ValueError, match=r"undisturbed.*another experiment.*regularizer.lambda_tsr was 0.9, is 0.1"
    ):
        fit(other, storage=storage, name="undisturbed")


def test_divergence_names_task_policy_and_step(experiment, storage):
    wild = replace(experiment, {"optimizer.learning_rate": 1e30, "policy.name": "UW"})
    with pytest.raises(
        ValueError, match=r"task '(segmentation|depth)': loss is .* at step \d+ with policy 'UW'"
    ):
        fit(wild, storage=storage, name="wild")


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
    experiment, storage, overrides, placement, message
):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        fit(replace(experiment, overrides), placement=placement, storage=storage, name="refused")
    assert time.monotonic() - start < 30
    assert not (storage / "refused").exists()
