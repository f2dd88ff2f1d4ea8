"""What a search found: its table, its best experiment.

Owns `SearchResult`, made of the configurations and their records. How a table is shown is in
`report/search_table.py`. Trains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas

import repmtl_ray
from repmtl_ray.config import Experiment, digest, replace, to_dict
from repmtl_ray.report.runs import pareto_front, search_runs
from repmtl_ray.report.search_table import answer, best_run
from repmtl_ray.search.draws import Draw, Draws
from repmtl_ray.search.run_records import METRIC, Record
from repmtl_ray.search.space import COLUMNS, flatten, other_settings

POPULATION_NOTE = (
    "Population based training copied weights from strong trials to weak ones and changed coefficients in "
    "mid-run. A result is of its whole schedule of coefficients; only the same search with the same seed "
    "repeats it. The trials are no independent runs, and the numbers by which they are ranked also made "
    "them, so the best delta_p is more optimistic than that of a search. What a schedule is worth is known "
    "when its values are trained anew with other seeds."
)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Args:
        table: one row per trial, best first: "rank", "delta_p_task" (percent), "status", the values
            searched, metrics of its last epoch, "error", "checkpoint", "digest", "protocol" ... Of
            population based training the values are the last, and "schedule" has them all:
            "first_epoch", "rank" (of the trial that trained then), "values".
        baseline: single-task metrics that delta_p is relative to.
        best: the experiment of `report.search_table.best_run`; None when no trial has a result, and
            when the best changed in mid-run: no single experiment repeats it.
        directory: path or URI of everything that the search wrote.
        experiment: what was not searched.
        histories: by the table's "trial", the metrics of every epoch.
        notes: on the data.
    """

    table: pandas.DataFrame
    baseline: dict[str, float]
    best: Experiment | None
    directory: str
    experiment: Experiment
    histories: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{answer(self.table, self.baseline)}\n\nall runs   {self.directory}"


def results_table(
    draws: Sequence[Draw],
    records: Mapping[str, Record | None],
    failures: Mapping[str, str],
    experiment: Experiment,
) -> pandas.DataFrame:
    """One row per configuration, best delta_p first, failed ones last.

    Args:
        draws: of the search.
        records: by the name of a draw; None for runs without a result.
        failures: reasons by the name of a draw.
        experiment: what was not searched.
    """
    rows, usual = [], flatten(to_dict(experiment))
    for draw in draws:
        record, error = records.get(draw.name), draw.error or failures.get(draw.name, "")
        last = {} if record is None else record["history"][-1]
        # Not an `Experiment`: a combination that it refuses is a failed draw, with its row.
        schedule = [] if record is None else record.get("schedule", [])
        has_changed = len(schedule) > 1
        values = usual | flatten(draw.changes) | (schedule[-1]["values"] if has_changed else {})
        rows.append(
            {
                "row": draw.row,
                "status": "failed" if error else "stopped" if record is None else record["status"],
                **{column: values[path] for column, path in COLUMNS.items()},
                "settings": other_settings(values, usual),
                **{
                    key: last[key]
                    for key in last
                    if "/" in key or key.startswith("delta_p") or key == "epoch"
                },
                "error": error,
                "checkpoint": "" if record is None else record["checkpoint"],
                "trial": str(draw.number),
                "config": dict(draw.changes),
                "digest": "" if draw.run is None or has_changed else digest(draw.run.experiment),
                "protocol": values["protocol"],
                "seed": values["seed"],
                "version": repmtl_ray.__version__,
                "schedule": schedule,
            }
        )
    table = pandas.DataFrame(rows)
    if METRIC not in table:
        table[METRIC] = float("nan")
    table = table.sort_values(METRIC, ascending=False, na_position="last", kind="stable")
    table = table.sort_values("status", key=lambda status: status == "failed", kind="stable")
    table.insert(0, METRIC, table.pop(METRIC))  # beside the rank, where a wide table still shows it
    table.insert(0, "rank", range(1, len(table) + 1))
    return _with_ranks(table, draws).reset_index(drop=True)


def _with_ranks(table: pandas.DataFrame, draws: Sequence[Draw]) -> pandas.DataFrame:
    """The table, in whose schedules ranks stand for the names of runs; no schedules if none has one."""
    if not table["schedule"].map(len).any():
        return table.drop(columns="schedule")
    rank_of = dict(zip(table["trial"], table["rank"], strict=True))
    ranks = {draw.name: rank_of[str(draw.number)] for draw in draws}
    named = [
        [
            {"first_epoch": e["first_epoch"], "rank": ranks[e["run"]], "values": e["values"]}
            for e in schedule
            if e["run"] in ranks
        ]
        for schedule in table["schedule"]
    ]
    return table.assign(schedule=pandas.Series(named, index=table.index, dtype=object))


def single_task_metrics(records: Sequence[Record]) -> dict[str, float]:
    """What delta_p of a search is relative to: every task's metrics after training it alone."""
    return {
        name: value
        for record in records
        for name, value in record["history"][-1].items()
        if name.startswith(f"{record['task']}/")
    }


def search_result(
    draws: Draws,
    records: Mapping[str, Record | None],
    failures: Mapping[str, str],
    baseline: dict[str, float],
    directory: str,
    notes: tuple[str, ...],
) -> SearchResult:
    """The result of a search: its configurations, and how they ended (as for `results_table`)."""
    table = results_table(draws.draws, records, failures, draws.experiment)
    best = best_run(table)
    has_changed = best is not None and len(best.get("schedule", [])) > 1
    if "schedule" in table:
        notes = (*notes, POPULATION_NOTE)
    return SearchResult(
        table=table,
        baseline=baseline,
        best=None if best is None or has_changed else replace(draws.experiment, best["config"]),
        directory=directory,
        experiment=draws.experiment,
        histories={
            str(draw.number): [
                {name: value for name, value in row.items() if "/" in name or name == "epoch"}
                for row in record["history"]
            ]
            for draw in draws.draws
            if (record := records.get(draw.name)) is not None
        },
        notes=notes,
    )


def with_front(result: SearchResult) -> SearchResult:
    """The same result, whose table says of every row whether no other is better in all tasks."""
    runs = search_runs(result.table, result.baseline, result.histories)
    complete = [run for run in runs if run.status != "failed" and run.gains]
    marks = pareto_front([list(run.gains.values()) for run in complete])
    front = {run.name for run, mark in zip(complete, marks, strict=True) if mark}
    table = result.table.copy()
    table.insert(2, "pareto", [run.name in front for run in runs])
    return dataclasses.replace(result, table=table)
