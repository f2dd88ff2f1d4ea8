"""The line of an epoch has what a reader looks at, and fits a wide terminal."""

from __future__ import annotations

from repmtl_ray.runs.live import epoch_line

METRICS = {
    "epoch": 2.0,
    "global_step": 40.0,
    "gradient_norm": 3.0,
    "depth/train_loss": 0.08897,
    "policy/weight/depth": 0.5,
    "rep_mtl/tsr": 0.28431,
    "rep_mtl/csa": 0.7425,
    "rep_mtl/dominance": 0.42,
    "rep_mtl/channel_mean/depth": 1.01,
    "depth/abs_error": 0.04965,
    "depth/loss": 0.05,
}


def test_the_line_has_losses_penalties_and_task_metrics_without_diagnostics() -> None:
    found = {"metrics": METRICS, "epochs": 4, "seconds": 30.0, "samples": 640, "waited": 0.6}
    assert epoch_line(found, [50.0]).split("  ") == [
        "epoch 2/4",
        "1 min 20 s left",
        "21.3 samples/s",
        "2 % waiting for data",
        "depth/train_loss 0.08897",
        "rep_mtl/tsr 0.2843",
        "rep_mtl/csa 0.7425",
        "depth/abs_error 0.04965",
        "depth/loss 0.05",
    ]


def test_the_last_line_says_how_long_all_epochs_took() -> None:
    metrics = {**METRICS, "epoch": 4.0}
    found = {"metrics": metrics, "epochs": 4, "seconds": 30.0, "samples": 640, "waited": 0.0}
    assert "  took 2 min 20 s  " in epoch_line(found, [110.0])
