"""A search over Rep-MTL's coefficients, temperature, policy and learning rate, on Ray Tune.

Owns the search from its arguments to its table of results. How runs are trained side by side is in
`study.py`, which configurations are drawn in `draws.py`, and the checks of a space in `space.py`. A trial
takes no CPU besides its run's workers, and no more trials start than fit: no search deadlocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repmtl_ray import cluster, node_check
from repmtl_ray.config import Experiment
from repmtl_ray.conversion import check_arguments
from repmtl_ray.placement import Placement
from repmtl_ray.prepared_run import check_settings, prepare_run, read_samples, with_model
from repmtl_ray.run_folder import check_resume, checked_place, claim, claim_study
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import loggers
from repmtl_ray.runs.callbacks import Callback
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.search import schedulers
from repmtl_ray.search.draws import (
    Draws,
    OptunaRuns,
    delta_p_objective,
    draw_at_random,
    task_objectives,
)
from repmtl_ray.search.mutations import check_population, mutations
from repmtl_ray.search.results import (
    SearchResult,
    search_result,
    single_task_metrics,
    with_front,
)
from repmtl_ray.search.run_records import METRIC, read_record
from repmtl_ray.search.space import (
    check_choice,
    check_numbers,
    check_objective,
    check_references,
    check_rows,
    check_space,
    described,
    own_names,
    with_names,
)
from repmtl_ray.search.study import (
    Study,
    num_tasks,
    train_baseline,
    train_missing,
    trains_in_process,
)

if TYPE_CHECKING:
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.models.own import ModelFunction


def tune(
    experiment: Experiment,
    param_space: Mapping[str, Any],
    *,
    data: CustomData | None = None,
    model: ModelFunction | None = None,
    num_samples: int = 10,
    searcher: Literal["random", "optuna"] = "random",
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = "none",
    objective: Literal["delta_p", "tasks"] = "delta_p",
    references: Sequence[Mapping[str, Any]] = (),
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    placement: Placement | None = None,
    max_concurrent: int | None = None,
    storage: str | Path | None = None,
    name: str | None = None,
    resume: bool = False,
    checkpoints: CheckpointConfig | None = None,
    callbacks: Sequence[Callback] = (),
    log: Sequence[str] = (),
    log_every: int = loggers.EVERY_STEPS,
    log_images: int = 0,
) -> SearchResult:
    """Searches `param_space` around an experiment for the largest delta_p over its tasks.

    Single-task baselines are trained first, unless the storage has them from before.

    Args:
        experiment: what is not searched.
        param_space: dotted paths of `Experiment` to Tune domains, `tune.grid_search` lists or plain
            values; may be nested.
        data, model: of your own, as for `fit`.
        num_samples: how many draws, `references` included, each another configuration; with grid
            values, how many draws of the other values the whole grid is run for. With "pbt" the size
            of the population.
        searcher: "random" (and grids) or "optuna" (no grids).
        scheduler: "asha" stops trials early that fall behind at the same epoch; "hyperband" does so
            in several brackets, some of which begin later; "pbt" is population based training: about
            eight times in a run, weak trials go on with the weights of strong ones and with changed
            coefficients (docs/guide.md). Then a result is of a schedule of coefficients.
        objective: what Optuna learns from: "delta_p", or "tasks", the gain of every task as an objective
            of its own; it then looks for their Pareto front, which the table's "pareto" names.
        references: values of the space, by its keys, that are tried first, for example EW on plain
            losses; keys that one leaves out are drawn.
        rows: configurations that are trained first and are no draws, by the name that the table
            gives them: dotted paths of `Experiment` with any values. Several for one name differ
            in the seed.
        placement: of every trial's workers.
        max_concurrent: at most so many trials at once; never more than the cluster has room for.
        storage: folder or URI shared by all nodes; by default under the home directory.
        name: of the search.
        resume: continue the search of this name: finished trials are kept, interrupted ones go on
            from their last checkpoint, failed ones are tried again, and more samples are added if
            `num_samples` is larger than before. Another space, searcher, scheduler or references are
            refused, and with "pbt" another `num_samples`.
        checkpoints: of every trial's run, as for `fit`.
        callbacks, log, log_every, log_images: of every trial's run, as for `fit`; each has its own copies.

    Returns:
        The table and the best experiment.

    Raises:
        ValueError: bad input or a storage that cannot be used, before anything is trained; the name
            is in use by another process.
        KeyboardInterrupt: as `run_lock.Interrupted`; `resume` continues the search.
    """
    check_arguments(tune, locals(), CustomData=object, ModelFunction=object)
    callbacks = loggers.checked_callbacks(callbacks, log, log_every, log_images)
    experiment = with_model(experiment, model)
    param_space, references, rows = map(with_names, (param_space, references, rows))
    placement = placement or Placement()
    if resume and name is None:
        raise ValueError("resume needs the name of the search to continue.")
    check_numbers(num_samples, len(references), max_concurrent)
    check_choice("searcher", searcher, ("random", "optuna"))
    check_choice("scheduler", scheduler, schedulers.NAMES)
    placement = check_settings(experiment, placement, data)
    known = None if data is None else data.tasks
    check_objective(objective, searcher, num_tasks(experiment, known))
    check_space(experiment, param_space, searcher, known)
    if scheduler == "pbt":
        check_population(
            experiment,
            param_space,
            num_samples,
            known,
            searcher=searcher,
            placement=placement,
            max_concurrent=max_concurrent,
        )
    check_references(param_space, references)
    check_rows(experiment, rows or {}, known)
    root, name = checked_place(storage, name, "tune", experiment)
    directory = f"{root}/{name}"
    loggers.check_place(log, directory)
    check_resume("search", directory, resume)
    print(f"search {name} in {root}", flush=True)
    prepared = prepare_run(
        experiment,
        placement=placement,
        data=data,
        model=model,
        names=own_names([param_space, references, rows]),
    )
    _check_dashboard(scheduler, placement)
    with hold(directory, "search"):
        note = claim(directory, experiment, prepared.own_data)
        settings = {
            "space": described(param_space),
            "references": described(list(references)),
            "searcher": searcher,
            "scheduler": scheduler,
            **({} if objective == "delta_p" else {"objective": objective}),
            **({"population": num_samples} if scheduler == "pbt" else {}),
        }
        named = {name: [dict(row) for row in found] for name, found in (rows or {}).items()}
        claim_study(directory, settings, methods=named, num_samples=num_samples)
        node_check.check_nodes(directory)
        samples = read_samples(prepared)
        study = Study.of(
            "search",
            directory,
            experiment,
            samples,
            placement=placement,
            max_concurrent=max_concurrent,
            epochs=experiment.epochs,
            metric=METRIC,
            checkpoints=checkpoints,
            callbacks=callbacks,
        )
        single = train_baseline(study, experiment, root, [experiment.seed])
        baseline = single_task_metrics(single)
        draws = Draws(experiment, known, directory)
        for row_name, configurations in named.items():
            for changes in configurations:
                draws.add(changes, row_name)
        failures = _train_draws(
            study,
            draws,
            param_space,
            references,
            num_samples,
            searcher=searcher,
            scheduler=scheduler,
            objective=objective,
            baseline=baseline,
        )
    records = {run.name: read_record(directory, run) for run in draws.runs}
    notes = (*samples.notes, *([note] if note else []))
    result = search_result(draws, records, failures, baseline, directory, notes)
    return result if objective == "delta_p" else with_front(result)


def _check_dashboard(scheduler: str, placement: Placement) -> None:
    """Refuses early stopping where Ray Train's runs would keep their CPUs (`has_dashboard`)."""
    if scheduler == "none" or trains_in_process(placement) or cluster.has_dashboard():
        return
    raise ValueError(
        "this Ray cluster has no dashboard, without which a trial of several workers that is stopped "
        "early keeps its CPUs for ever; start its head with --include-dashboard=true, or search "
        "without early stopping (scheduler 'none'), or with one worker per trial."
    )


def _train_draws(
    study: Study,
    draws: Draws,
    param_space: Mapping[str, Any],
    references: Sequence[Mapping[str, Any]],
    num_samples: int,
    *,
    searcher: str,
    scheduler: str,
    objective: str,
    baseline: Mapping[str, float],
) -> dict[str, str]:
    """Draws and trains.

    Args:
        study: of the search.
        draws: gets every configuration.
        param_space, references, num_samples, searcher, scheduler, objective: as for `tune`.
        baseline: single-task metrics.

    Returns:
        The reasons of failures by the name of a run.
    """
    directory = study.directory
    if scheduler == "pbt":
        return _train_population(study, draws, param_space, references, num_samples, baseline)
    early_stopping = schedulers.scheduler_of(scheduler, draws.experiment.epochs, directory)
    if searcher == "optuna":
        _, failures = train_missing(study, draws.runs, folder=directory, baseline=baseline)
        source = OptunaRuns(
            param_space,
            references,
            num_samples,
            draws=draws,
            directory=directory,
            read=lambda run: read_record(directory, run),
            objectives=task_objectives(baseline) if objective == "tasks" else delta_p_objective,
            num_objectives=num_tasks(draws.experiment, draws.known) if objective == "tasks" else 1,
        )
        return failures | study.train(
            source,
            folder=directory,
            baseline=baseline,
            scheduler=early_stopping,
            limit=num_samples,
        )
    draw_at_random(draws, param_space, references, num_samples)
    _, failures = train_missing(
        study, draws.runs, folder=directory, baseline=baseline, scheduler=early_stopping
    )
    return failures


def _train_population(
    study: Study,
    draws: Draws,
    param_space: Mapping[str, Any],
    references: Sequence[Mapping[str, Any]],
    num_samples: int,
    baseline: Mapping[str, float],
) -> dict[str, str]:
    """As `_train_draws`, by population based training; the rows are no part of the population."""
    from repmtl_ray.search.pbt import ResumablePBT

    directory, experiment, known = study.directory, draws.experiment, draws.known
    _, failures = train_missing(study, draws.runs, folder=directory, baseline=baseline)
    draw_at_random(draws, param_space, references, num_samples)
    population = [draw.run for draw in draws.draws if draw.run is not None and not draw.row]
    changes = mutations(experiment, param_space, num_tasks(experiment, known))
    _, failed = train_missing(
        study,
        population,
        folder=directory,
        baseline=baseline,
        scheduler=ResumablePBT(directory, population, changes, experiment, known),
    )
    return failures | failed
