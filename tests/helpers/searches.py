"""A small search's experiment, and results as Ray Tune gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas

from repmtl_ray.config import DataConfig, Experiment

BASE = Experiment(data=DataConfig(name="cityscapes"), epochs=10)
TSR, CSA, TAU = "regularizer.lambda_tsr", "regularizer.lambda_csa", "regularizer.temperature"
RATE, POLICY, LOGS = "optimizer.learning_rate", "policy.name", "policy.log_losses"
METRICS = ("segmentation/miou", "depth/abs_error")
BASELINE = {"segmentation/miou": 40.0, "depth/abs_error": 0.05}


def result(config: Any, error: Any = None, **metrics: Any) -> SimpleNamespace:
    frame = pandas.DataFrame([metrics]) if metrics else None
    return SimpleNamespace(
        config=config, error=error, metrics=metrics or None, metrics_dataframe=frame
    )


def metrics_of(
    delta_p: Any, *, epoch: int = 10, miou: float = 40.0, abs_error: float = 0.05
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "segmentation/miou": miou,
        "depth/abs_error": abs_error,
        "delta_p_task": delta_p,
        "delta_p_metric": delta_p / 2,
        "checkpoint_path": f"/runs/{delta_p}",
        "trial_id": f"trial-{delta_p}",
        "time_total_s": 3.0,
    }


RESULTS = [
    result({TSR: 0.1, POLICY: "EW"}, **metrics_of(-2.5)),
    result({TSR: 0.5, POLICY: "UWW"}, error=ValueError("no such policy")),
    result(
        {TSR: 0.9, POLICY: "UW"}, error=ValueError("a\nloss is nan"), **metrics_of(9.0, epoch=2)
    ),
    result({TSR: 0.3, POLICY: "GLS"}, **metrics_of(3.0, epoch=4, miou=41.5)),
    result({"regularizer": {"lambda_tsr": 0.7}, POLICY: "DWA"}, **metrics_of(1.25, miou=42.0)),
    result({TSR: 1.1, POLICY: "RLW"}),
]
