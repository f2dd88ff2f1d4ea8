"""A search over Rep-MTL's coefficients, temperature, policy and learning rate, on Ray Tune.

Owns the search from its arguments to its table of results. The trial driver is in `trial.py`, the
single-task baselines in `baseline.py`, the checks of a space in `space.py`. Never deadlocks on a
small cluster: a driver takes no CPU, and no more trials start than there is room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas
from ray import tune as ray_tune
from ray.tune.search.basic_variant import BasicVariantGenerator

import repmtl_ray
from repmtl_ray import alike, cluster
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, digest, replace, to_dict
from repmtl_ray.run_folder import check_resume, checked_place, claim
from repmtl_ray.run_lock import hold
from repmtl_ray.runs.keeper import Checkpoints
from repmtl_ray.search.baseline import single_task_baseline
from repmtl_ray.search.progress import Progress
from repmtl_ray.search.space import (
    check_choice,
    check_references,
    check_space,
    complete,
    flatten,
    problem_of,
    whole_paths,
)
from repmtl_ray.search.trial import finish, histories_of, make_tuner, reason, results_of, run_trial
from repmtl_ray.train import cache_data, preflight

METRIC = "delta_p_task"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Args:
        table: one row per trial, best first: "rank", "delta_p_task" (percent), "status", the values
            searched, all metrics of its last epoch, "delta_p_metric" (percent), "error",
            "checkpoint", "digest", "protocol".
        baseline: single-task metrics that delta_p is relative to.
        best: the experiment of the first row; None when no trial finished an epoch, or all failed.
        directory: path or URI of everything the search wrote.
        experiment: what was not searched.
        histories: by trial, the metrics of every epoch that it reported.
        notes: on the data, one sentence each.
    """

    table: pandas.DataFrame
    baseline: dict[str, float]
    best: Experiment | None
    directory: str
    experiment: Experiment
    histories: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    checkpoints: Checkpoints | None = None,
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
        references: values of the space, by its keys, that are tried first, for example EW on plain
            losses; keys that one leaves out are drawn.
        placement: of every trial's workers.
        max_concurrent: at most so many trials at once; never more than the cluster has room for.
        storage_path: folder or URI shared by all nodes; by default under the home directory.
        name: of the search.
        resume: continue the search of this name: finished trials are kept, interrupted ones go on
            from their last checkpoint, failed ones are tried again.
        checkpoints: of every trial's run, as for `fit`.

    Returns:
        The table and the best experiment.

    Raises:
        ValueError: bad input or a storage that cannot be used, before anything is trained; the name
            is in use by another process.
        KeyboardInterrupt: as `run_lock.Interrupted`; `resume` continues the search.
    """
    placement = placement or Placement()
    if resume and name is None:
        raise ValueError("resume needs the name of the search to continue.")
    _check_numbers(num_samples, len(references), max_concurrent)
    check_choice("searcher", searcher, ("random", "optuna"))
    check_choice("scheduler", scheduler, ("none", "asha"))
    check_space(experiment, param_space, searcher)
    check_references(param_space, references)
    root, name = checked_place(storage_path, name, "tune", experiment)
    directory = f"{root}/{name}"
    check_resume("search", directory, resume)
    print(f"search {name} in {root}", flush=True)
    cluster.connect()
    if scheduler == "asha" and not cluster.has_dashboard():
        raise ValueError(
            "this Ray cluster has no dashboard, without which a trial that is stopped early keeps its CPUs for ever; start "
            "its head with --include-dashboard=true, or search without early stopping (scheduler 'none')."
        )
    preflight(experiment, placement)
    with hold(directory, "search"):
        claim(directory, experiment)
        alike.check_nodes(directory)
        data = cache_data(experiment)
        room = max(1, placement.concurrent())
        concurrency = min(room, max_concurrent or room)
        progress = Progress(experiment.epochs, METRIC)
        baseline = single_task_baseline(
            experiment,
            data,
            placement=placement,
            storage_path=root,
            concurrency=concurrency,
            progress=progress,
            checkpoints=checkpoints,
        )
        whole = whole_paths(param_space)
        driver = ray_tune.with_parameters(
            run_trial,
            experiment=to_dict(experiment),
            data=data,
            placement=placement,
            storage_path=directory,
            baseline=baseline,
            checkpoints=checkpoints,
            whole=whole,
        )
        tuner = make_tuner(
            driver,
            dict(param_space),
            directory,
            config=ray_tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=num_samples,
                max_concurrent_trials=concurrency if searcher == "optuna" else None,
                reuse_actors=scheduler == "none",  # a driver stopped early still waits for its run
                search_alg=_search_algorithm(
                    searcher, param_space, references, experiment.seed, concurrency
                ),
                scheduler=_scheduler(scheduler, experiment.epochs, directory),
            ),
            progress=progress,
            resume=resume,
        )
        grid = finish(tuner, may_stop=scheduler != "none")
        result = _found(grid, experiment, baseline, directory, whole)
        return dataclasses.replace(result, notes=data.notes)


def results_table(
    results: ray_tune.ResultGrid, experiment: Experiment, *, whole: frozenset[str] = frozenset()
) -> pandas.DataFrame:
    """One row a trial, best delta_p first, failed ones last."""
    rows = []
    for result in results_of(results):
        metrics = result.metrics or {}
        config = flatten(result.config or {}, whole=whole)
        # Not an `Experiment`: a combination that it refuses is a failed trial, with its row.
        values = flatten(to_dict(experiment)) | flatten(config)
        epoch = metrics.get("epoch", 0)
        status = "failed" if result.error else "done" if epoch >= values["epochs"] else "stopped"
        rows.append(
            {
                "status": status,
                "policy": values["policy.name"],
                "log_losses": values["policy.log_losses"],
                "lambda_tsr": values["regularizer.lambda_tsr"],
                "lambda_csa": values["regularizer.lambda_csa"],
                "tau": values["regularizer.temperature"],
                "learning_rate": values["optimizer.learning_rate"],
                **{
                    key: metrics[key]
                    for key in metrics
                    if "/" in key or key.startswith("delta_p") or key == "epoch"
                },
                "error": reason(result.error) if result.error else "",
                "checkpoint": metrics.get("checkpoint_path", ""),
                "trial": metrics.get("trial_id", ""),
                "config": config,
                "digest": ""
                if problem_of(experiment, config)
                else digest(replace(experiment, config)),
                "protocol": values["protocol"],
                "seed": values["seed"],
                "version": repmtl_ray.__version__,
            }
        )
    table = pandas.DataFrame(rows)
    if METRIC not in table:
        table[METRIC] = float("nan")
    table = table.sort_values(METRIC, ascending=False, na_position="last", kind="stable")
    table = table.sort_values("status", key=lambda status: status == "failed", kind="stable")
    table.insert(0, METRIC, table.pop(METRIC))  # beside the rank, where a wide table still shows it
    table.insert(0, "rank", range(1, len(table) + 1))
    return table.reset_index(drop=True)


def _found(
    results: ray_tune.ResultGrid,
    experiment: Experiment,
    baseline: dict[str, float],
    directory: str,
    whole: frozenset[str],
) -> SearchResult:
    """What the trials that have ended say."""
    table = results_table(results, experiment, whole=whole)
    done = table[(table["status"] != "failed") & table[METRIC].notna()]
    best = None if done.empty else replace(experiment, done.iloc[0]["config"])
    return SearchResult(
        table=table,
        baseline=baseline,
        best=best,
        directory=directory,
        experiment=experiment,
        histories=histories_of(results),
    )


def _check_numbers(num_samples: int, num_references: int, max_concurrent: int | None) -> None:
    if num_samples < max(1, num_references):
        raise ValueError(
            f"num_samples is {num_samples}; expected at least 1, and at least the {num_references} references."
        )
    if max_concurrent is not None and max_concurrent < 1:
        raise ValueError(f"max_concurrent is {max_concurrent}; expected at least 1.")


def _search_algorithm(
    searcher: str,
    param_space: Mapping[str, Any],
    references: Sequence[Mapping[str, Any]],
    seed: int,
    concurrency: int,
) -> Any:
    points = [dict(reference) for reference in references]
    if searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        points = [complete(point, param_space, seed) for point in points]
        return OptunaSearch(points_to_evaluate=points or None, seed=seed)
    return BasicVariantGenerator(
        points_to_evaluate=points or None, random_state=seed, max_concurrent=concurrency
    )


def _scheduler(scheduler: str, epochs: int, directory: str) -> Any:
    if scheduler == "none":
        return None
    from repmtl_ray.search.asha import RUNGS_FILE, ResumableASHA

    # Beyond the last epoch, so that a trial which gets there ends by itself and is not stopped at
    # its end.
    return ResumableASHA(
        f"{directory}/{RUNGS_FILE}",
        time_attr="epoch",
        max_t=epochs + 1,
        grace_period=max(1, epochs // 4),
        reduction_factor=2,
    )
