"""A search over Rep-MTL's coefficients, temperature, policy and learning rate together, on Ray
Tune.

Owns the only use of Ray Tune: the trial driver (a Tune trial that builds and runs one Ray Train
run), single-task baselines trained first and cached, concurrency that fits the cluster, and the
table of results. Never deadlocks on a small cluster: a driver takes no CPU, and no more trials
start than have room for all their workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas
import ray
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Categorical, Domain

import repmtl_ray
from repmtl_ray import cluster, storage
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, digest, from_dict, replace, to_dict
from repmtl_ray.delta import delta_p
from repmtl_ray.progress import Progress
from repmtl_ray.train import CachedData, cache_data, fresh_name, preflight, train

METRIC = "delta_p_task"
DRIVER = {"node:__internal_head__": 0.001}
"""A driver waits for its workers; any CPU it took would be one that they wait for."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Args:
        table: one row a trial, best first: rank, status, the values searched, all metrics of its
            last epoch, "delta_p_task" and "delta_p_metric" (percent), "error", "checkpoint",
            "digest", "protocol".
        baseline: single-task metrics that delta_p is relative to.
        best: the experiment of the first row; None when no trial finished an epoch.
        directory: path or URI of everything the search wrote.
    """

    table: pandas.DataFrame
    baseline: dict[str, float]
    best: Experiment | None
    directory: str


def tune(
    experiment: Experiment,
    param_space: Mapping[str, Any],
    *,
    num_samples: int = 10,
    searcher: Literal["random", "optuna"] = "random",
    scheduler: Literal["none", "asha"] = "none",
    references: Sequence[Mapping[str, Any]] = (),
    placement: Placement | None = None,
    max_concurrent: int | None = None,
    storage_path: str | None = None,
    name: str | None = None,
    resume: bool = False,
) -> SearchResult:
    """Searches `param_space` around an experiment for the largest delta_p over its tasks.

    Single-task baselines are trained first, unless the storage has them from before.

    Args:
        experiment: what is not searched.
        param_space: dotted paths of `Experiment` to Tune domains, `tune.grid_search` lists or plain
            values; may be nested.
        num_samples: how many draws, `references` included; with grid values, how often the grid is
            run.
        searcher: "random" (and grids) or "optuna" (no grids).
        scheduler: "asha" stops trials early that fall behind at the same epoch.
        references: values (all keys of the space) that are tried first, for example EW on plain
            losses.
        placement: of every trial's workers.
        max_concurrent: at most so many trials at once; never more than the cluster has room for.
        storage_path: folder or URI shared by all nodes; by default under the home directory.
        name: of the search.
        resume: continue the search of this name: finished trials are kept, interrupted ones go on
            from their last checkpoint, failed ones are tried again.

    Returns:
        The table and the best experiment.

    Raises:
        ValueError: bad input, before anything is trained.
    """
    placement = placement or Placement()
    if resume and name is None:
        raise ValueError("resume needs the name of the search to continue.")
    if num_samples < max(1, len(references)):
        raise ValueError(
            f"num_samples is {num_samples}; expected at least 1, and at least the {len(references)} references."
        )
    check_space(experiment, param_space, searcher)
    cluster.connect()
    preflight(experiment, placement)
    root = storage.absolute(storage_path)
    name = name or fresh_name("tune", experiment)
    directory = f"{root}/{name}"
    _check_name(directory, resume)
    print(f"search {name} in {root}", flush=True)
    data = cache_data(experiment)
    concurrency = max(1, min(placement.concurrent(), max_concurrent or placement.concurrent()))
    baseline = single_task_baseline(
        experiment, data, placement=placement, storage_path=root, concurrency=concurrency
    )
    driver = ray_tune.with_parameters(
        _trial,
        experiment=to_dict(experiment),
        data=data,
        placement=placement,
        storage_path=directory,
        baseline=baseline,
    )
    tuner = _tuner(
        driver,
        dict(param_space),
        directory,
        config=ray_tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=num_samples,
            max_concurrent_trials=concurrency if searcher == "optuna" else None,
            reuse_actors=True,
            search_alg=_search_algorithm(searcher, references, experiment.seed, concurrency),
            scheduler=_scheduler(scheduler, experiment.epochs),
        ),
        progress=Progress(experiment.epochs, METRIC),
        resume=resume,
    )
    table = results_table(tuner.fit(), experiment)
    done = table[table[METRIC].notna()] if METRIC in table else table.iloc[:0]
    best = None if done.empty else _experiment_of(experiment, done.iloc[0]["config"])
    return SearchResult(table=table, baseline=baseline, best=best, directory=directory)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted paths; `grid_search` lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) != {"grid_search"}:
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def check_space(experiment: Experiment, param_space: Mapping[str, Any], searcher: str) -> None:
    """Tries every value of every discrete choice, and the ends of ranges, before a trial does.

    Raises:
        ValueError: a path that names no field, a value that its field or the policy refuses, a grid
            under Optuna.
    """
    from repmtl_ray import loop

    for path, domain in flatten(param_space).items():
        is_grid = isinstance(domain, Mapping)
        if is_grid and searcher != "random":
            raise ValueError(
                f"search space: {path!r} is a grid, which searcher {searcher!r} cannot search; use 'random'."
            )
        if is_grid:
            candidates = list(domain["grid_search"])
        elif isinstance(domain, Categorical):
            candidates = list(domain.categories)
        elif isinstance(domain, Domain):
            candidates = [
                getattr(domain, end) for end in ("lower", "upper") if hasattr(domain, end)
            ]
        else:
            candidates = [domain]
        for candidate in candidates:
            try:
                loop.selected_tasks(replace(experiment, {path: candidate}))
            except ValueError as error:
                raise ValueError(
                    f"search space: {path!r} may become {candidate!r}: {error}"
                ) from error


def single_task_baseline(
    experiment: Experiment,
    data: CachedData,
    *,
    placement: Placement,
    storage_path: str,
    concurrency: int,
) -> dict[str, float]:
    """Each task trained alone with the same protocol; read back when the storage has the same from
    before.

    Args:
        experiment: its policy and penalties do not matter.
        data, placement, storage_path, concurrency: as in `tune`.

    Returns:
        "<task>/<metric>" of every task's last epoch.
    """
    from repmtl_ray import loop

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
        _single_task_trial,
        experiments={name: to_dict(alone) for name, alone in missing.items()},
        data=data,
        placement=placement,
        storage_path=f"{storage_path}/baselines/{digest(experiment)}-{time.strftime('%Y%m%d-%H%M%S')}",
    )
    tuner = _tuner(
        driver,
        {"task": ray_tune.grid_search(list(missing))},
        f"{storage_path}/baselines/search-{time.strftime('%Y%m%d-%H%M%S')}",
        config=ray_tune.TuneConfig(search_alg=BasicVariantGenerator(max_concurrent=concurrency)),
        progress=Progress(experiment.epochs, None),
        resume=False,
    )
    for result in _results(tuner.fit()):
        if result.error is not None:
            raise RuntimeError(
                f"the single-task baseline failed, without which delta_p means nothing: {_reason(result.error)}"
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
    """The experiment with one of its tasks alone, on its plain loss."""
    return replace(
        experiment,
        {
            "tasks": [task],
            "policy": {"name": "stl", "log_losses": False},
            "regularizer.lambda_tsr": 0.0,
            "regularizer.lambda_csa": 0.0,
        },
    )


def results_table(results: ray_tune.ResultGrid, experiment: Experiment) -> pandas.DataFrame:
    """One row a trial, best delta_p first, failed ones last."""
    rows = []
    for result in _results(results):
        metrics = result.metrics or {}
        config = flatten(result.config or {})
        trial = replace(experiment, config)
        epoch = metrics.get("epoch", 0)
        status = "failed" if result.error else "done" if epoch >= trial.epochs else "stopped"
        rows.append(
            {
                "status": status,
                "policy": trial.policy.name,
                "log_losses": trial.policy.log_losses,
                "lambda_tsr": trial.regularizer.lambda_tsr,
                "lambda_csa": trial.regularizer.lambda_csa,
                "tau": trial.regularizer.temperature,
                "learning_rate": trial.optimizer.learning_rate,
                **{
                    key: metrics[key]
                    for key in metrics
                    if "/" in key or key.startswith("delta_p") or key == "epoch"
                },
                "error": _reason(result.error) if result.error else "",
                "checkpoint": metrics.get("checkpoint_path", ""),
                "trial": metrics.get("trial_id", ""),
                "config": config,
                "digest": digest(trial),
                "protocol": trial.protocol,
                "seed": trial.seed,
                "version": repmtl_ray.__version__,
            }
        )
    table = pandas.DataFrame(rows)
    if METRIC in table:
        table = table.sort_values(METRIC, ascending=False, na_position="last", kind="stable")
    table.insert(0, "rank", range(1, len(table) + 1))
    return table.reset_index(drop=True)


def _results(grid: ray_tune.ResultGrid) -> list[Any]:
    return [grid[index] for index in range(len(grid))]


def _tuner(
    driver: Any,
    param_space: dict[str, Any],
    directory: str,
    *,
    config: ray_tune.TuneConfig,
    progress: Progress,
    resume: bool,
) -> ray_tune.Tuner:
    trainable = ray_tune.with_resources(driver, DRIVER)
    if resume:
        return ray_tune.Tuner.restore(
            f"{directory}/search", trainable=trainable, resume_errored=True, param_space=param_space
        )
    return ray_tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=config,
        run_config=ray_tune.RunConfig(
            name="search", storage_path=directory, verbose=0, callbacks=[progress]
        ),
    )


def _trial(
    config: dict[str, Any],
    *,
    experiment: dict[str, Any],
    data: CachedData,
    placement: Placement,
    storage_path: str,
    baseline: dict[str, float] | None,
) -> None:
    """One Tune trial: waits for one Ray Train run, whose every report goes on to Tune."""
    trial = _experiment_of(from_dict(Experiment, experiment), config)
    result = train(
        trial,
        data,
        placement=placement,
        storage=f"{storage_path}/runs",
        name=ray_tune.get_context().get_trial_id(),
        baseline=baseline,
        callbacks=[TuneReportCallback()],
    )
    if (
        result.epochs_now == 0
    ):  # it had finished before the search was interrupted: no report went through the callback
        metrics = dict(result.metrics)
        if baseline is not None:
            delta = delta_p(metrics, baseline)
            metrics.update(delta_p_task=delta.task, delta_p_metric=delta.metric)
        ray_tune.report({**metrics, "checkpoint_path": result.checkpoint})


def _single_task_trial(
    config: dict[str, Any],
    *,
    experiments: dict[str, dict[str, Any]],
    data: CachedData,
    placement: Placement,
    storage_path: str,
) -> None:
    _trial(
        {},
        experiment=experiments[config["task"]],
        data=data,
        placement=placement,
        storage_path=storage_path,
        baseline=None,
    )


def _experiment_of(experiment: Experiment, config: Mapping[str, Any]) -> Experiment:
    return replace(experiment, flatten(config))


def _search_algorithm(
    searcher: str, references: Sequence[Mapping[str, Any]], seed: int, concurrency: int
) -> Any:
    points = [dict(reference) for reference in references]
    if searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(points_to_evaluate=points or None, seed=seed)
    if searcher != "random":
        raise ValueError(f"searcher is {searcher!r}; expected 'random' or 'optuna'.")
    return BasicVariantGenerator(
        points_to_evaluate=points or None, random_state=seed, max_concurrent=concurrency
    )


def _scheduler(scheduler: str, epochs: int) -> Any:
    if scheduler == "none":
        return None
    if scheduler != "asha":
        raise ValueError(f"scheduler is {scheduler!r}; expected 'none' or 'asha'.")
    from ray.tune.schedulers import ASHAScheduler

    # Beyond the last epoch, so that a trial which gets there ends by itself and is not stopped at
    # its end.
    return ASHAScheduler(
        time_attr="epoch", max_t=epochs + 1, grace_period=max(1, epochs // 4), reduction_factor=2
    )


def _check_name(directory: str, resume: bool) -> None:
    found = storage.exists(f"{directory}/search")
    if resume and not found:
        raise ValueError(
            f"resume: there is no search at {directory}; check its name and storage, or start it without resume."
        )
    if found and not resume:
        raise ValueError(
            f"a search at {directory} exists already; give another name, or resume to continue it."
        )


def _baseline_file(storage_path: str, alone: Experiment, data: CachedData) -> str:
    return (
        f"{storage_path}/baselines/{digest(alone)}-{data.fingerprint}-{repmtl_ray.__version__}.json"
    )


def _reason(error: BaseException) -> str:
    """The user's error in one line, without Ray's wrapping."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
