"""A study: a list of runs that are trained side by side, each with one record.

Owns how searches, benchmarks and single-task baselines train their runs: every run is a trial of Ray
Tune (`trial.py`), which leaves `records/<name>.json` when it ends. The records are all
that tables are made of, and all that a study is continued from: a run that has one is not trained
again. Which runs there are is for `search/__init__.py` and `studies/benchmark.py`.

Every trial process imports this module, so it imports little.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ray
from ray import tune as ray_tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher

import repmtl_ray
from repmtl_ray import node_check, storage
from repmtl_ray.config import Experiment, ExperimentError, digest, replace
from repmtl_ray.placement import Placement
from repmtl_ray.placement_group_cleanup import ended_by_interrupt, remove_last_groups
from repmtl_ray.runs.callbacks import Callback
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.runs.worker import CachedData
from repmtl_ray.runs.worker_loss import losses_printed
from repmtl_ray.search.progress import Cleanup, NoteTrialLosses, Progress
from repmtl_ray.search.run_records import (
    METRIC,
    Record,
    Run,
    other_code,
    read_record,
    record_location,
    shared_facts,
    write_failure,
    write_stopped_record,
)
from repmtl_ray.search.trial import TrialSettings, in_process, with_ray_train

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

MAX_FAILURES = 3
"""How often the run of a trial goes on from its last checkpoint after its process was lost; nodes
that Ray was told would go do not count."""
SINGLE_TASK = "stl"


class Source(Protocol):
    """Hands out the runs of a study, one after the other."""

    def next_run(self) -> Run | None:
        """A run that has no record; None when there is no other."""

    def tell(self, run: Run, metrics: Mapping[str, Any] | None) -> None:
        """How a run ended: the metrics of its last epoch, or None."""


class ListedRuns:
    """Runs that are known from the beginning."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)

    def next_run(self) -> Run | None:
        return self._runs.pop(0) if self._runs else None

    def tell(self, run: Run, metrics: Mapping[str, Any] | None) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the runs of a study share.

    Args:
        kind: "search" or "benchmark".
        directory: path or URI of the study, where Tune keeps its state.
        data: the samples.
        placement: of every run's workers.
        concurrency: at most so many runs at once.
        progress: prints.
        facts: what all records say.
        checkpoints, callbacks: as for `fit`.
    """

    kind: str
    directory: str
    data: CachedData
    placement: Placement
    concurrency: int
    progress: Progress
    facts: Mapping[str, Any]
    checkpoints: CheckpointConfig | None = None
    callbacks: Sequence[Callback] = ()

    @classmethod
    def of(
        cls,
        kind: Literal["search", "benchmark"],
        directory: str,
        experiment: Experiment,
        data: CachedData,
        *,
        placement: Placement,
        max_concurrent: int | None,
        epochs: int,
        metric: str | None = None,
        notes: Sequence[str] = (),
        checkpoints: CheckpointConfig | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Study:
        """A study of a cluster that is connected.

        Args:
            kind, directory, data, placement, checkpoints, callbacks: of the study.
            experiment: what its runs share.
            max_concurrent: at most so many runs at once; None: as many as there is room for.
            epochs: of its longest run.
            metric: that is printed of every run; None prints none.
            notes: for its records, besides those of the data.
        """
        room = max(1, placement.concurrent())
        return cls(
            kind=kind,
            directory=directory,
            data=data,
            placement=placement,
            concurrency=min(room, max_concurrent or room),
            progress=Progress(epochs, metric),
            facts=shared_facts(experiment, data, notes),
            checkpoints=checkpoints,
            callbacks=callbacks,
        )

    def train(
        self,
        source: Source,
        *,
        folder: str,
        baseline: Mapping[str, float] | None = None,
        scheduler: Any = None,
        limit: int = 10**6,
    ) -> dict[str, str]:
        """Trains all that a source hands out.

        Args:
            source: of the runs.
            folder: path or URI that has their folders ("runs") and records ("records").
            baseline: single-task metrics that every epoch's delta_p is relative to.
            scheduler: of Ray Tune; may stop runs early, or change what they train.
            limit: how many runs the source hands out at most.

        Returns:
            The reason by name of every run that failed; the others have a record.
        """
        first = source.next_run()
        if first is None:
            return {}
        name = "baseline" if first.experiment.policy.name == SINGLE_TASK else self.kind
        settings = self._settings(folder, baseline)
        is_in_process = trains_in_process(self.placement)
        order, space = self._order(source, first, scheduler, limit)
        tuner = ray_tune.Tuner(
            in_process(settings) if is_in_process else with_ray_train(settings),
            param_space=space,
            tune_config=ray_tune.TuneConfig(
                **order,
                metric=None if scheduler is None else METRIC,
                mode=None if scheduler is None else "max",
                # A trial that waits for a run of Ray Train still does when it is stopped early.
                reuse_actors=is_in_process or scheduler is None,
                scheduler=scheduler,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=ray_tune.RunConfig(
                name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
                storage_path=self.directory,
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),  # runs do
                failure_config=ray_tune.FailureConfig(
                    max_failures=MAX_FAILURES if is_in_process else 0
                ),
                callbacks=[self.progress, Cleanup(), NoteTrialLosses(folder)],
            ),
        )
        logging.getLogger("ray.tune.logger.tensorboardx").setLevel(logging.WARNING)
        with ended_by_interrupt(), losses_printed(f"{folder}/runs/"):
            results = tuner.fit()
        if scheduler is not None or results.errors:
            remove_last_groups()
        return self._failures(results, folder)

    def _order(
        self, source: Source, first: Run, scheduler: Any, limit: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Which runs there are and how many train at once, as settings of Ray Tune and its space."""
        if isinstance(scheduler, PopulationBasedTraining):
            from repmtl_ray.search.pbt import Population

            runs = [first, *iter(source.next_run, None)]
            # They take turns: what their trials reserve limits how many train at once.
            space = {"run": ray_tune.grid_search(runs)}
            return {"search_alg": Population(), "num_samples": 1}, space
        settings = {"search_alg": _Suggestions(source, first), "num_samples": limit}
        return {**settings, "max_concurrent_trials": self.concurrency}, {}

    def _settings(self, folder: str, baseline: Mapping[str, float] | None) -> TrialSettings:
        return TrialSettings(
            data=self.data,
            placement=self.placement.decided(
                runs=self.concurrency, reads_storage=self.data.reads_storage
            ),
            folder=folder,
            baseline=None if baseline is None else dict(baseline),
            facts=dict(self.facts),
            checkpoints=self.checkpoints,
            callbacks=self.callbacks,
            driver_note=node_check.write_driver_note(folder),
        )

    def _failures(self, results: ray_tune.ResultGrid, folder: str) -> dict[str, str]:
        """Reasons of failures; runs that were stopped early get their record here."""
        reasons = {}
        for index in range(len(results)):
            result = results[index]
            run, metrics = (result.config or {})["run"], result.metrics or {}
            if result.error is not None:
                reasons[run.name] = reason_of(result.error)
                write_failure(folder, run, reasons[run.name])
            elif "error" in metrics:
                reasons[run.name] = metrics["error"]
            elif metrics and not storage.exists(record_location(folder, run.name)):
                write_stopped_record(folder, run, self.facts, metrics)
        return reasons


def trains_in_process(placement: Placement) -> bool:
    """Whether a run needs no process besides its trial's."""
    return placement.num_workers == 1


class _Suggestions(Searcher):
    """The runs of a source as Ray Tune asks for them."""

    def __init__(self, source: Source, first: Run) -> None:
        super().__init__()
        self._source = source
        self._first: Run | None = first
        self._runs: dict[str, Run] = {}

    def suggest(self, trial_id: str) -> Any:
        run = self._first or self._source.next_run()
        self._first = None
        if run is None:
            return Searcher.FINISHED
        self._runs[trial_id] = run
        return {"run": run}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        has_metrics = result is not None and "error" not in result
        self._source.tell(self._runs.pop(trial_id), result if has_metrics else None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a study is continued from its records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


def train_missing(
    study: Study,
    runs: Sequence[Run],
    *,
    folder: str,
    baseline: Mapping[str, float] | None = None,
    scheduler: Any = None,
) -> tuple[dict[str, Record], dict[str, str]]:
    """Trains the runs that have no record.

    Args:
        study, folder, baseline, scheduler: as in `Study.train`.
        runs: all of them.

    Returns:
        The records and the reasons of failures, both by name.
    """
    records = {run.name: read_record(folder, run) for run in runs}
    for run in runs:
        if (record := records[run.name]) is not None:
            print(f"{run.label}: from {record_location(folder, run.name)}", flush=True)
            if note := other_code(record):
                print(f"note: {run.label} was {note}.", flush=True)
    missing = [run for run in runs if records[run.name] is None]
    reasons = study.train(
        ListedRuns(missing),
        folder=folder,
        baseline=baseline,
        scheduler=scheduler,
        limit=len(missing),
    )
    records |= {run.name: read_record(folder, run) for run in missing}
    complete = {name: record for name, record in records.items() if record is not None}
    return complete, {
        run.name: reasons.get(run.name, "it did not finish")
        for run in runs
        if run.name not in complete
    }


def num_tasks(experiment: Experiment, known: tuple[Task, ...] | None = None) -> int:
    """How many tasks an experiment trains; `known` as in `selected_tasks`."""
    from repmtl_ray.runs import build

    return len(build.selected_tasks(experiment, known))


def single_task(experiment: Experiment, task: str) -> Experiment:
    """The experiment with one of its tasks alone, on its plain loss; equal for all policies and
    penalties."""
    return replace(
        experiment,
        {
            "tasks": [task],
            "policy": {"name": SINGLE_TASK, "log_losses": False},
            "regularizer": {"lambda_tsr": 0.0, "lambda_csa": 0.0},
            "model.representation": "encoder",
        },
    )


def baseline_runs(
    experiment: Experiment, tasks: Sequence[str], seeds: Sequence[int], made_with: str
) -> list[Run]:
    """Each task alone with each seed; `made_with` is the data's fingerprint and the version of this
    package."""
    runs = []
    for seed in seeds:
        for task in tasks:
            alone = replace(single_task(experiment, task), {"seed": seed})
            several = f", seed {seed}" if len(seeds) > 1 else ""
            runs.append(
                Run(
                    name=f"{digest(alone)}-{made_with}",
                    label=f"single-task {task}{several}",
                    experiment=alone,
                    facts={"method": SINGLE_TASK, "task": task},
                )
            )
    return runs


def train_baseline(
    study: Study, experiment: Experiment, root: str, seeds: Sequence[int]
) -> list[Record]:
    """Each task trained alone by the same protocol, or read back if the storage has the same.

    Args:
        study: whose data and placement are used.
        experiment: its policy and penalties do not matter.
        root: storage, whose folder "baselines" all studies share.
        seeds: of the runs.

    Returns:
        One record per task and seed.

    Raises:
        ExperimentError: a run failed.
    """
    from repmtl_ray.runs import loop

    tasks = [task.name for task in loop.selected_tasks(experiment, study.data.tasks)]
    runs = baseline_runs(
        experiment, tasks, seeds, f"{study.data.fingerprint}-{repmtl_ray.__version__}"
    )
    records, failures = train_missing(study, runs, folder=f"{root}/{storage.BASELINES}")
    if failures:
        raise ExperimentError(
            "the single-task baseline failed, without which delta_p means nothing: "
            + "; ".join(sorted(set(failures.values())))
        )
    # They may be from a study whose methods had other settings, which single tasks do not have.
    return [{**records[run.name], "changes": study.facts["changes"]} for run in runs]


def reason_of(error: BaseException) -> str:
    """The user's error in one line, without Ray's wrapping."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
