"""A search whose trials train nothing, by this project's `tune`, with Optuna and ASHA.

python -m tests.helpers.quick_search FOLDER
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

from ray import tune as ray_tune

from repmtl_ray import cluster, search
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.search import SearchResult, trial
from repmtl_ray.search.run_records import METRIC, Run, make_record, write_record
from repmtl_ray.search.trial import InProcessTrial, Result, RunsInProcess, TrialSettings

EPOCHS, TRIALS, NAME = 4, 8, "quick"
RATE = "optimizer.learning_rate"
EXPERIMENT = Experiment(data=DataConfig(name="cityscapes", height=32, width=64), epochs=EPOCHS)


class QuickTrial(InProcessTrial):
    """In place of a run: better the nearer the rate is to 0.3, and with every epoch."""

    def setup(self, config: dict[str, Any], settings: TrialSettings | None = None) -> None:
        super().setup(config, settings)
        self._runs = QuickRuns(settings)


class QuickRuns(RunsInProcess):
    def results(self, run: Run) -> Generator[Result, None, None]:
        history = []
        for epoch in range(1, EPOCHS + 1):
            time.sleep(0.3)
            value = 0.1 * epoch - abs(run.experiment.optimizer.learning_rate - 0.3)
            history.append({"epoch": epoch, METRIC: value, "segmentation/miou": 1 + value})
            if epoch == EPOCHS:
                record = make_record(run.experiment, {}, history, checkpoint="")
                write_record(self._settings.folder, run.name, record)
            yield {**history[-1], "done": epoch == EPOCHS}


def searched(storage: str, *, resume: bool, num_samples: int = TRIALS) -> SearchResult:
    nothing = SimpleNamespace(notes=(), final=None, fingerprint="f", reads_storage=False)
    for module, name, replacement in (
        (search, "prepare_run", lambda *_, **__: SimpleNamespace(own_data=None)),
        (search, "read_samples", lambda *_: nothing),
        (search, "train_baseline", lambda *_: []),
        (trial, "InProcessTrial", QuickTrial),
    ):
        setattr(module, name, replacement)
    return search.tune(
        EXPERIMENT,
        {RATE: ray_tune.uniform(0.01, 1.0)},
        num_samples=num_samples,
        searcher="optuna",
        scheduler="asha",
        max_concurrent=2,
        storage=storage,
        name=NAME,
        resume=resume,
    )


if __name__ == "__main__":
    cluster.connect()
    searched(sys.argv[1], resume=False)
