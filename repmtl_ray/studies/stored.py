"""The result of a search or a benchmark as its folder has it, whether it has ended or not.

Owns how records become again what `tune` or `benchmark` returned. Trains nothing and needs no cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repmtl_ray import storage
from repmtl_ray.config import Experiment, digest, from_dict, replace, to_dict
from repmtl_ray.data.sources import tasks_of
from repmtl_ray.run_folder import own_tasks, read_study, read_values
from repmtl_ray.search import SearchResult, search_result, single_task_metrics, with_front
from repmtl_ray.search.draws import REFUSED, Draw, Draws
from repmtl_ray.search.run_records import Record, Run, read_record
from repmtl_ray.search.study import SINGLE_TASK, baseline_runs
from repmtl_ray.studies.benchmark import BenchmarkResult


def stored_study(directory: str) -> SearchResult | BenchmarkResult:
    """Reads a study's records.

    Runs that failed, and configurations of a search that are no experiment, stand in the table with the
    reason. Others that have no record are named: in a
    benchmark among the failures, in a search by a note.

    Args:
        directory: path or URI of the search or the benchmark. The folder "baselines" beside it has the
            single-task runs.

    Raises:
        ValueError: it is no such folder, or no run has finished, or a single-task run is missing.
    """
    experiment, study = read_study(directory)
    records = _values_by_name(f"{directory}/records")
    failures = {
        name: values
        for name, values in _values_by_name(f"{directory}/failures").items()
        if name not in records
    }
    if not records:
        raise ValueError(
            f"{directory}: no run has finished, so there is no table to make; continue it with --resume."
        )
    known = records.keys() | failures.keys()
    unfinished = [name for name in storage.list_names(f"{directory}/runs") if name not in known]
    make = _search if "space" in study["settings"] else _benchmark
    return make(directory, experiment, study, records, failures, unfinished)


def _values_by_name(folder: str) -> dict[str, Record]:
    return {
        name.removesuffix(".json"): read_values(f"{folder}/{name}") or {}
        for name in storage.list_names(folder)
    }


def _search(
    directory: str,
    experiment: Experiment,
    study: Mapping[str, Any],
    records: Mapping[str, Record],
    failures: Mapping[str, Record],
    unfinished: Sequence[str],
) -> SearchResult:
    first = next(iter(records.values()))
    baseline = single_task_metrics(_baseline(directory, experiment, [experiment.seed], first))
    rows = {
        digest(replace(experiment, row)): name
        for name, configurations in study["methods"].items()
        for row in configurations
    }
    draws = Draws(experiment)
    order = {name: place for place, name in enumerate(rows)}
    ended = {**records, **failures}
    for name in sorted(ended, key=lambda name: (order.get(name, len(order)), name)):
        trained = from_dict(Experiment, ended[name]["experiment"])
        run = Run(name=name, label=name, experiment=trained)
        draws.draws.append(
            Draw(
                number=len(draws.draws) + 1,
                changes=_changes(experiment, trained),
                run=run,
                row=rows.get(name, ""),
            )
        )
    for values in _values_by_name(f"{directory}/{REFUSED}").values():
        draws.draws.append(
            Draw(
                number=len(draws.draws) + 1,
                changes=values["changes"],
                run=None,
                error=values["reason"],
                row=values["row"],
            )
        )
    notes = tuple(first["notes"])
    if unfinished:
        notes += (f"{len(unfinished)} more did not finish; they are left out.",)
    reasons = {name: values["reason"] for name, values in failures.items()}
    result = search_result(draws, records, reasons, baseline, directory, notes)
    return with_front(result) if "objective" in study["settings"] else result


def _changes(experiment: Experiment, trained: Experiment) -> dict[str, Any]:
    """The parts of an experiment that a run changed, whole."""
    before, after = to_dict(experiment), to_dict(trained)
    return {name: value for name, value in after.items() if value != before[name]}


def _benchmark(
    directory: str,
    experiment: Experiment,
    study: Mapping[str, Any],
    records: Mapping[str, Record],
    failures: Mapping[str, Record],
    unfinished: Sequence[str],
) -> BenchmarkResult:
    methods = [name for name in study["methods"] if name != SINGLE_TASK]
    ordered = sorted(
        records.values(), key=lambda record: (methods.index(record["method"]), record["seed"])
    )
    seeds = sorted({record["seed"] for record in ordered})
    is_own = study["settings"]["baseline"] == "own"
    return BenchmarkResult(
        records=ordered,
        baseline=_baseline(directory, experiment, seeds, ordered[0]) if is_own else [],
        failures={values["label"]: values["reason"] for values in failures.values()}
        | dict.fromkeys(unfinished, "it has not finished"),
        directory=directory,
    )


def _baseline(
    directory: str, experiment: Experiment, seeds: Sequence[int], record: Record
) -> list[Record]:
    """The single-task runs that a study compares with; `record` is one of its own."""
    known = (
        [task.name for task in tasks_of(experiment.data)]
        if experiment.data.name != "custom"
        else []
    )
    known = known or own_tasks(directory)
    tasks = [name for name in known if name in (experiment.tasks or known)]
    made_with = f"{record['fingerprint']}-{record['version']}"
    folder = f"{directory.rpartition('/')[0]}/{storage.BASELINES}"
    found = []
    for run in baseline_runs(experiment, tasks, seeds, made_with):
        alone = read_record(folder, run)
        if alone is None:
            raise ValueError(
                f"{directory}: the record of {run.label} is missing in {folder}; a folder that was moved needs "
                "that one beside it."
            )
        found.append({**alone, "changes": record["changes"]})
    return found
