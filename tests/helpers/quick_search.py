"""A search whose trials train nothing, by this project's tuner, with Optuna and ASHA.

python -m tests.helpers.quick_search FOLDER
"""

from __future__ import annotations

import sys
import time
from typing import Any

from ray import tune as ray_tune

from repmtl_ray import cluster, search
from repmtl_ray.search.progress import Progress
from repmtl_ray.search.trial import finish, make_tuner

EPOCHS, TRIALS = 4, 8


def quick(config: dict[str, float]) -> None:
    """Better the nearer to 0.3, and with every epoch."""
    for epoch in range(1, EPOCHS + 1):
        time.sleep(0.3)
        value = 0.1 * epoch - abs(config["x"] - 0.3)
        ray_tune.report({"epoch": epoch, search.METRIC: value})


def searched(folder: str, *, resume: bool) -> tuple[ray_tune.ResultGrid, Any]:
    """The results, and Optuna's study."""
    space = {"x": ray_tune.uniform(0.0, 1.0)}
    tuner = make_tuner(
        quick,
        space,
        folder,
        config=ray_tune.TuneConfig(
            metric=search.METRIC,
            mode="max",
            num_samples=TRIALS,
            max_concurrent_trials=2,
            search_alg=search._search_algorithm("optuna", space, (), 0, 2),
            scheduler=search._scheduler("asha", EPOCHS, folder),
        ),
        progress=Progress(EPOCHS, search.METRIC),
        resume=resume,
    )
    results = finish(tuner)
    return results, tuner._local_tuner._tune_config.search_alg._ot_study


if __name__ == "__main__":
    cluster.connect()
    searched(sys.argv[1], resume=False)
