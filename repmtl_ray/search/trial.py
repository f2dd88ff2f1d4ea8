"""The trial driver: a Tune trial that builds and runs one Ray Train run.

Owns what every Tune experiment of this project has in common, searches and baselines alike: the
driver, its place in the cluster, and the Tuner around it. Imports little, because every driver
process imports it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from ray import tune as ray_tune

from repmtl_ray import storage
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, digest, from_dict, replace
from repmtl_ray.delta import delta_p
from repmtl_ray.placement_group_cleanup import ended_by_interrupt, remove_last_groups
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import relay
from repmtl_ray.runs.keeper import Checkpoints
from repmtl_ray.runs.worker import CachedData
from repmtl_ray.search.asha import RUNGS_FILE
from repmtl_ray.search.progress import Cleanup, Progress
from repmtl_ray.search.space import flatten
from repmtl_ray.train import train

logger = logging.getLogger(__name__)

DRIVER = {"node:__internal_head__": 0.001}
"""A driver waits for its workers; any CPU it took would be one that they wait for."""


def run_trial(
    config: dict[str, Any],
    *,
    experiment: dict[str, Any],
    data: CachedData,
    placement: Placement,
    storage_path: str,
    baseline: dict[str, float] | None,
    checkpoints: Checkpoints | None = None,
    whole: frozenset[str] = frozenset(),
) -> None:
    """One Tune trial: waits for one Ray Train run, whose every report goes on to Tune.

    The run is named by the digest of its experiment: whatever Tune has forgotten when a search goes
    on, training that was done is found again.

    Args:
        config: the values of this trial.
        experiment: what is not searched, as plain values.
        data, placement, baseline, checkpoints: as in `train`.
        storage_path: of the search.
        whole: paths of `config` whose values are mappings that replace a part as it is.
    """
    trial = replace(from_dict(Experiment, experiment), flatten(config, whole=whole))
    name = digest(trial)
    with hold(f"{storage_path}/runs/{name}", "run", wait=True), relay.to_tune() as reports:
        result = train(
            trial,
            data,
            placement=placement,
            storage=f"{storage_path}/runs",
            name=name,
            checkpoints=checkpoints,
            baseline=baseline,
            callbacks=[reports],
        )
    if result.epochs_now == 0:  # it had finished before an interruption: no report went through
        metrics = dict(result.metrics)
        if baseline is not None:
            delta = delta_p(metrics, baseline)
            metrics.update(delta_p_task=delta.task, delta_p_metric=delta.metric)
        ray_tune.report({**metrics, "checkpoint_path": result.checkpoint})


def single_task_trial(
    config: dict[str, Any],
    *,
    experiments: dict[str, dict[str, Any]],
    data: CachedData,
    placement: Placement,
    storage_path: str,
    checkpoints: Checkpoints | None = None,
) -> None:
    """The same for one of several single-task experiments, by `config["task"]`."""
    run_trial(
        {},
        experiment=experiments[config["task"]],
        data=data,
        placement=placement,
        storage_path=storage_path,
        baseline=None,
        checkpoints=checkpoints,
    )


def make_tuner(
    driver: Any,
    param_space: dict[str, Any],
    directory: str,
    *,
    config: ray_tune.TuneConfig,
    progress: Progress,
    resume: bool,
) -> ray_tune.Tuner:
    """A Tuner whose state is in `directory`/search, new or continued.

    Where an interruption left no state of Tune's that can be read, the trials start over: those
    that had finished are read back from their runs, the others go on from their checkpoints.
    """
    trainable = ray_tune.with_resources(driver, DRIVER)
    if resume and not _has_state(f"{directory}/search"):
        storage.remove(f"{directory}/{RUNGS_FILE}")  # of trials whose names are forgotten
    elif resume:
        return ray_tune.Tuner.restore(
            f"{directory}/search", trainable=trainable, resume_errored=True, param_space=param_space
        )
    return ray_tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=config,
        run_config=ray_tune.RunConfig(
            name="search", storage_path=directory, verbose=0, callbacks=[progress, Cleanup()]
        ),
    )


def _has_state(location: str) -> bool:
    """Whether Tune can restore a search; states that were torn are removed, so that it takes the
    one before."""
    names = storage.list_names(location)
    states = [name for name in names if name.startswith("experiment_state-")]
    for name in sorted(states, reverse=True):
        content = storage.read(f"{location}/{name}")
        try:
            json.loads(content)
        except ValueError as error:
            logger.warning("%s/%s is torn (%s); taking the one before it", location, name, error)
            storage.remove(f"{location}/{name}")
            continue
        if "tuner.pkl" in names:
            return True
    logger.warning("%s holds no state of a search; finished runs are read back", location)
    return False


def finish(tuner: ray_tune.Tuner, *, may_stop: bool = False) -> ray_tune.ResultGrid:
    """Runs all its trials; nothing of them is left in the cluster afterwards.

    Args:
        tuner: from `make_tuner`.
        may_stop: whether it may stop trials early.
    """
    with ended_by_interrupt():
        results = tuner.fit()
    if may_stop or results.errors:
        remove_last_groups()
    return results


def results_of(grid: ray_tune.ResultGrid) -> list[Any]:
    """One result a trial."""
    return [grid[index] for index in range(len(grid))]


def histories_of(grid: ray_tune.ResultGrid) -> dict[str, list[dict[str, float]]]:
    """By trial id, the metrics of every epoch; of one reported twice, after a restart, the last."""
    found = {}
    for result in results_of(grid):
        table = result.metrics_dataframe
        if table is not None and "epoch" in table and result.metrics:
            rows = table.drop_duplicates("epoch", keep="last").sort_values("epoch")
            names = [name for name in rows if "/" in name or name == "epoch"]
            found[result.metrics.get("trial_id", "")] = [
                {str(name): float(value) for name, value in row.dropna().items()}
                for _, row in rows[names].select_dtypes("number").iterrows()
            ]
    return found


def reason(error: BaseException) -> str:
    """The user's error in one line, without Ray's wrapping."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
