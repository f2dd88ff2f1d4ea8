"""Records of a benchmark, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repmtl_ray.config import DataConfig, Experiment, to_dict

NAMES = ("segmentation/miou", "segmentation/pixel_accuracy", "depth/abs_error", "depth/rel_error")


def record(
    method: Any, seed: int, values: Any, *, path: Path | None = None, **changes: Any
) -> dict[str, Any]:
    experiment = Experiment(data=DataConfig(name="cityscapes", path=path))
    return {
        "method": method,
        "seed": seed,
        "metrics": dict(zip(NAMES, values, strict=True)),
        "experiment": to_dict(experiment),
        "digest": f"d{method}",
        "dataset": "cityscapes",
        "source": "rendered street scenes",
        "fingerprint": "f",
        "protocol": "libmtl",
        "changes": "",
        "reported_split": "val",
        "commit": "c0ffee",
        "version": "0",
        **changes,
    }


def single(seed: int, values: Any, **changes: Any) -> list[dict[str, Any]]:
    whole = record("stl", seed, values, **changes)
    return [
        {**whole, "metrics": {n: v for n, v in whole["metrics"].items() if n.startswith(task)}}
        for task in ("segmentation", "depth")
    ]


BASE = [*single(0, (50, 80, 0.03, 0.3)), *single(1, (52, 82, 0.05, 0.5))]
RUNS = [
    record("EW", 0, (48, 81, 0.04, 0.4)),
    record("EW", 1, (50, 83, 0.03, 0.3)),
    record("UW", 0, (47, 80, 0.02, 0.2)),
    record("UW", 1, (45, 80, 0.02, 0.2)),
]
