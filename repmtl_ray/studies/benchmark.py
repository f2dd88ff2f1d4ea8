"""Methods x seeds by one protocol, single-task baselines first, on Ray Tune.

Owns which runs a benchmark has; `search/study.py` trains them, and continues a benchmark from the
records of those that have ended. What records mean is in `report/records.py`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repmtl_ray import node_check, protocols
from repmtl_ray.config import Experiment, replace
from repmtl_ray.conversion import check_arguments
from repmtl_ray.delta import published
from repmtl_ray.placement import Placement
from repmtl_ray.prepared_run import check_settings, prepare_run, read_samples, with_model
from repmtl_ray.report import benchmark_table
from repmtl_ray.report.records import data_source, published_name, summarise
from repmtl_ray.report.runs import benchmark_runs, conclusion
from repmtl_ray.run_folder import check_resume, checked_place, claim, claim_study
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import loggers
from repmtl_ray.runs.callbacks import Callback
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.search.run_records import Record, Run
from repmtl_ray.search.space import own_names, with_names
from repmtl_ray.search.study import SINGLE_TASK, Study, train_baseline, train_missing
from repmtl_ray.studies.methods import Changes
from repmtl_ray.studies.methods import methods as methods_by_name

if TYPE_CHECKING:
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.models.own import ModelFunction
    from repmtl_ray.tasks import Task


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What a benchmark found.

    Args:
        records: one per finished run of a method; see `report/records.py`.
        baseline: one per single-task run (of one task and seed); empty if published rows stand in.
        failures: the reason per run that did not finish, by its label.
        directory: path or URI of everything that was written.
    """

    records: list[Record]
    baseline: list[Record]
    failures: dict[str, str]
    directory: str

    def __str__(self) -> str:
        if not self.records:
            return "\n".join(f"{run}: {reason}" for run, reason in self.failures.items())
        summary = summarise(self.records, self.baseline, failures=self.failures)
        sentence = conclusion(benchmark_runs(self.records, summary.baseline_means))
        table = benchmark_table.terminal(summary)
        return f"{table}\n\n{textwrap.fill(sentence, 100)}\n\nall runs   {self.directory}"


def benchmark(
    experiment: Experiment,
    methods: Mapping[str, Mapping[str, Any]] | Sequence[str],
    *,
    data: CustomData | None = None,
    model: ModelFunction | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: Literal["own", "published"] = "own",
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
) -> BenchmarkResult:
    """Trains every method with every seed, and each task alone with every seed before that.

    Args:
        experiment: what the methods share, its `protocol` included; from `protocols.settings`.
        methods: by the name in the table, what is different: dotted paths of `Experiment`. Or names
            that `studies.methods.method` knows: ["EW", "EW-log", "FairGrad", "Rep-MTL"].
        data, model: of your own, as for `fit`; of such data the best epoch of the evaluation split is
            reported.
        seeds: of the runs.
        baseline: "own" trains the single-task rows (or reads them back, if the storage has the very
            same); "published" leaves it to the paper's rows.
        placement, max_concurrent, storage: as in `tune`.
        name: of the benchmark.
        resume: continue the benchmark of this name: runs that have a record are kept, interrupted
            ones go on from their last checkpoint, failed ones are tried again. There may be other
            methods and more seeds than before; a method that has changed is refused.
        checkpoints: of every run, as for `fit`.
        callbacks, log, log_every, log_images: of every run, as for `fit`; each has its own copies.

    Returns:
        The records. A method that fails is among the failures, and the others go on.

    Raises:
        ValueError: bad input or a storage that cannot be used, before anything is trained; the name
            is in use by another process; a single-task run that failed, without which delta_p means
            nothing.
        KeyboardInterrupt: as `run_lock.Interrupted`; `resume` continues the benchmark.
    """
    check_arguments(benchmark, locals(), CustomData=object, ModelFunction=object)
    callbacks = loggers.checked_callbacks(callbacks, log, log_every, log_images)
    experiment = with_model(experiment, model)
    named: dict[str, Changes] = with_names(
        methods if isinstance(methods, Mapping) else methods_by_name(methods)
    )
    placement = placement or Placement()
    if resume and name is None:
        raise ValueError("resume needs the name of the benchmark to continue.")
    protocols.check_name(experiment.protocol)
    protocols.check_epochs(experiment.protocol, experiment.epochs)
    placement = check_settings(experiment, placement, data)
    runs = method_runs(experiment, named, seeds, None if data is None else data.tasks)
    if baseline == "published":
        _check_published(experiment)
    root, name = checked_place(storage, name, "benchmark", experiment)
    directory = f"{root}/{name}"
    loggers.check_place(log, directory)
    check_resume("benchmark", directory, resume)
    print(f"benchmark {name} in {root}", flush=True)
    final = protocols.final_split(experiment.protocol, experiment.data)
    prepared = prepare_run(
        experiment,
        placement=placement,
        data=data,
        model=model,
        final_split=final,
        names=own_names(named),
    )
    with hold(directory, "benchmark"):
        note = claim(directory, experiment, prepared.own_data)
        claim_study(directory, {"baseline": baseline}, methods=named)
        node_check.check_nodes(directory)
        samples = read_samples(prepared)
        study = Study.of(
            "benchmark",
            directory,
            experiment,
            samples,
            placement=placement,
            max_concurrent=max_concurrent,
            epochs=max(run.experiment.epochs for run in runs),
            notes=[note] if note else [],
            checkpoints=checkpoints,
            callbacks=callbacks,
        )
        single = train_baseline(study, experiment, root, seeds) if baseline == "own" else []
        records, failures = train_missing(study, runs, folder=directory)
    return BenchmarkResult(
        records=[records[run.name] for run in runs if run.name in records],
        baseline=single,
        failures={run.label: failures[run.name] for run in runs if run.name in failures},
        directory=directory,
    )


def method_runs(
    experiment: Experiment,
    methods: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    known: tuple[Task, ...] | None = None,
) -> list[Run]:
    """Every method with every seed, checked; `known` as in `selected_tasks`.

    Raises:
        ValueError: no method, no seed, one twice, or a method that cannot be trained or is of other
            data.
    """
    from repmtl_ray.runs import loop

    if not set(methods) - {SINGLE_TASK}:
        raise ValueError(
            f"methods: there is none; name at least one ({SINGLE_TASK!r} is trained anyway)."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; expected at least one, each once.")
    runs = []
    for method, changes in methods.items():
        if method == SINGLE_TASK:
            continue
        for seed in seeds:
            try:
                own = replace(experiment, {**changes, "seed": seed})
                loop.selected_tasks(own, known)
            except ValueError as error:
                raise ValueError(f"method {method!r}: {error}") from error
            if own.data != experiment.data or own.protocol != experiment.protocol:
                raise ValueError(
                    f"method {method!r} changes the data or the protocol, so that its row could "
                    "not stand beside the others."
                )
            runs.append(
                Run(
                    name=f"{re.sub(r'[^A-Za-z0-9.]+', '_', method)}-s{seed}",
                    label=f"{method}, seed {seed}",
                    experiment=own,
                    facts={"method": method},
                )
            )
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"methods {', '.join(methods)}: two have the same file name.")
    return runs


def _check_published(experiment: Experiment) -> None:
    dataset = published_name(experiment.data)
    if dataset is None:
        raise ValueError(
            f"baseline 'published': {data_source(experiment.data)} has no published single-task "
            "row; take baseline 'own'."
        )
    published(dataset)
