"""The driver of the tests here: a search of a few trials in a process of its own.

python -m tests.helpers.cluster_search STORAGE NUM_TRIALS EPOCHS
"""

from __future__ import annotations

import sys
from typing import Any

from ray import tune as ray_tune

from repmtl_ray import search
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig

BASELINE = {
    "segmentation": {"segmentation/miou": 10.0, "segmentation/pixel_accuracy": 30.0},
    "depth": {"depth/abs_error": 0.1, "depth/rel_error": 1.0},
}


def main(storage: str, num_trials: int, epochs: int) -> None:
    def given(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        return [{"task": task, "history": [metrics]} for task, metrics in BASELINE.items()]

    search.train_baseline = given  # two trials of 15 s that test nothing here
    experiment = Experiment(
        data=DataConfig(name="cityscapes", height=32, width=64, num_train=16, num_val=4),
        model=ModelConfig(encoder="test_efficientnet", head="linear", dropout=0.0),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.01),
        epochs=epochs,
        batch_size=2,
    )
    found = search.tune(
        experiment,
        {"regularizer.lambda_tsr": ray_tune.grid_search([0.1 * n for n in range(num_trials)])},
        num_samples=1,
        storage=storage,
        name="grown",
    )
    print(found.table[["status", "epoch", "error"]].to_string())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
