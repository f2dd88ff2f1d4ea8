"""Single-task training, which delta_p is relative to.

Owns how a baseline follows from an experiment, that all of them are trained before a search, and
where they are kept: under a name made of everything that they depend on.
"""

from __future__ import annotations

import json
import time

from ray import tune as ray_tune
from ray.tune.search.basic_variant import BasicVariantGenerator

import repmtl_ray
from repmtl_ray import storage
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, ExperimentError, digest, replace, to_dict
from repmtl_ray.runs.keeper import Checkpoints
from repmtl_ray.runs.worker import CachedData
from repmtl_ray.search.progress import Progress
from repmtl_ray.search.trial import finish, make_tuner, reason, results_of, single_task_trial


def single_task_baseline(
    experiment: Experiment,
    data: CachedData,
    *,
    placement: Placement,
    storage_path: str,
    concurrency: int,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Each task trained alone with the same protocol, or read back if the storage has the same.

    Args:
        experiment: its policy and penalties do not matter.
        data, placement, storage_path, concurrency, checkpoints: as in `tune`.
        progress: also the printer of the trials that follow.

    Returns:
        "<task>/<metric>" of every task's last epoch.
    """
    from repmtl_ray.runs import loop

    metrics: dict[str, float] = {}
    missing: dict[str, Experiment] = {}
    for task in loop.selected_tasks(experiment):
        alone = single_task(experiment, task.name)
        cached = _baseline_file(storage_path, alone, data)
        if storage.exists(cached):
            print(f"single-task {task.name}: from {cached}", flush=True)
            metrics.update(json.loads(storage.read_text(cached))["metrics"])
        else:
            missing[task.name] = alone
    if not missing:
        return metrics
    driver = ray_tune.with_parameters(
        single_task_trial,
        experiments={name: to_dict(alone) for name, alone in missing.items()},
        data=data,
        placement=placement,
        storage_path=f"{storage_path}/baselines/{data.fingerprint}-{repmtl_ray.__version__}",
        checkpoints=checkpoints,
    )
    tuner = make_tuner(
        driver,
        {"task": ray_tune.grid_search(list(missing))},
        f"{storage_path}/baselines/search-{time.strftime('%Y%m%d-%H%M%S')}",
        config=ray_tune.TuneConfig(search_alg=BasicVariantGenerator(max_concurrent=concurrency)),
        progress=progress,
        resume=False,
    )
    for result in results_of(finish(tuner)):
        if result.error is not None:
            raise ExperimentError(
                f"the single-task baseline failed, without which delta_p means nothing: {reason(result.error)}"
            )
        name = result.config["task"]
        own = {key: value for key, value in result.metrics.items() if key.startswith(f"{name}/")}
        record = {"metrics": own, "experiment": to_dict(missing[name])}
        storage.write_text(
            _baseline_file(storage_path, missing[name], data), json.dumps(record, indent=2)
        )
        metrics.update(own)
    return metrics


def single_task(experiment: Experiment, task: str) -> Experiment:
    """The experiment with one of its tasks alone, on its plain loss; equal for all policies and
    penalties."""
    return replace(
        experiment,
        {
            "tasks": [task],
            "policy": {"name": "stl", "log_losses": False},
            "regularizer": {"lambda_tsr": 0.0, "lambda_csa": 0.0},
            "model.representation": "encoder",
        },
    )


def _baseline_file(storage_path: str, alone: Experiment, data: CachedData) -> str:
    return (
        f"{storage_path}/baselines/{digest(alone)}-{data.fingerprint}-{repmtl_ray.__version__}.json"
    )
