"""A search whose trials train nothing, by this project's `tune`, with Optuna and ASHA.

python -m tests.helpers.quick_search FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace
from typing import Any

from ray import tune as ray_tune

from repmtl_ray import cluster, search
from repmtl_ray.config import DataConfig, Experiment, from_dict
from repmtl_ray.search import SearchResult, study
from repmtl_ray.search.run_records import METRIC, make_record, write_record

EPOCHS, TRIALS, NAME = 4, 8, "quick"
RATE = "optimizer.learning_rate"
EXPERIMENT = Experiment(data=DataConfig(name="cityscapes", height=32, width=64), epochs=EPOCHS)


def quick(config: dict[str, Any], *, folder: str, **_: Any) -> None:
    """In place of a run: better the nearer the rate is to 0.3, and with every epoch."""
    experiment = from_dict(Experiment, json.loads(config["content"])["experiment"])
    history = []
    for epoch in range(1, EPOCHS + 1):
        time.sleep(0.3)
        value = 0.1 * epoch - abs(experiment.optimizer.learning_rate - 0.3)
        history.append({"epoch": epoch, METRIC: value, "segmentation/miou": 1 + value})
        ray_tune.report(history[-1])
    write_record(folder, config["run"], make_record(experiment, {}, history, checkpoint=""))


def searched(storage: str, *, resume: bool, num_samples: int = TRIALS) -> SearchResult:
    nothing = SimpleNamespace(notes=(), final=None, fingerprint="f")
    for module, name, replacement in (
        (search, "prepare_run", lambda *_, **__: None),
        (search, "read_samples", lambda *_: nothing),
        (search, "train_baseline", lambda *_: []),
        (study, "run_trial", quick),
    ):
        setattr(module, name, replacement)
    return search.tune(
        EXPERIMENT,
        {RATE: ray_tune.uniform(0.01, 1.0)},
        num_samples=num_samples,
        searcher="optuna",
        scheduler="asha",
        max_concurrent=2,
        storage_path=storage,
        name=NAME,
        resume=resume,
    )


if __name__ == "__main__":
    cluster.connect()
    searched(sys.argv[1], resume=False)
