"""Training runs as the report shows them, from the records of a benchmark or the table of a search.

Owns that common form, gains by task, the Pareto front, and the conclusion: which configuration is
best, and whether the numbers allow to say so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas

from repmtl_ray.delta import delta_p, directions
from repmtl_ray.report.records import Record

PARAMETERS = ("losses", "lambda_tsr", "lambda_csa", "tau", "share", "learning rate")
WITH_PENALTIES = " + penalties"
LEVEL = 0.05
"""A difference is called clear below this p-value."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a benchmark or a search.

    Args:
        name: of this run alone.
        method: of a benchmark; of a search's trial its row's name, or its policy, and whether it has
            penalties. Runs of one method have one colour.
        configuration: what runs that differ in nothing but the seed have in common.
        parameters: by the names of `PARAMETERS`; None where the method does not use it.
        metrics: by "<task>/<metric>", as reported.
        delta_p: over tasks, in percent; None without a result.
        gains: mean relative gain over single-task training by task, in percent.
        is_reference: whether it is EW or another constant weighting without penalties, which other
            configurations are held against.
        history: one row per epoch.
        status: "done", "stopped" (early), "failed", ...
        reason: of a failure.
        seed, digest: of the experiment.
    """

    name: str
    method: str
    configuration: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    delta_p: float | None
    gains: Mapping[str, float]
    is_reference: bool = False
    history: Sequence[Mapping[str, float]] = ()
    status: str = "done"
    reason: str = ""
    seed: int = 0
    digest: str = ""


def benchmark_runs(records: Sequence[Record], baseline: Mapping[str, float]) -> list[Run]:
    """The runs of a benchmark.

    Args:
        records: of the methods.
        baseline: single-task metrics that gains are relative to.
    """
    runs = []
    for record in records:
        experiment = record["experiment"]
        metrics = {name: float(record["metrics"][name]) for name in baseline}
        runs.append(
            _run(
                experiment["policy"]["name"],
                {
                    "log_losses": experiment["policy"]["log_losses"],
                    "lambda_tsr": experiment["regularizer"]["lambda_tsr"],
                    "lambda_csa": experiment["regularizer"]["lambda_csa"],
                    "tau": experiment["regularizer"]["temperature"],
                    "share": experiment["regularizer"].get("share"),
                    "learning_rate": experiment["optimizer"]["learning_rate"],
                },
                baseline,
                name=f"{record['method']}, seed {record['seed']}",
                method=record["method"],
                metrics=metrics,
                delta_p=delta_p(metrics, baseline).task,
                history=record["history"],
                seed=record["seed"],
                digest=record["digest"],
            )
        )
    return runs


def search_runs(
    table: pandas.DataFrame,
    baseline: Mapping[str, float],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[Run]:
    """The trials of a search.

    Args:
        table: of the search's result.
        baseline: single-task metrics.
        histories: by trial, one row per epoch.
    """
    runs = []
    for _, row in table.iterrows():
        delta = row["delta_p_task"]
        has_penalties = bool(row["lambda_tsr"] or row["lambda_csa"])
        runs.append(
            _run(
                row["policy"],
                row,
                baseline,
                name=f"trial {row['rank']}: {row.get('row') or row['policy']}",
                method=row.get("row") or row["policy"] + WITH_PENALTIES * has_penalties,
                metrics={
                    name: float(row[name])
                    for name in directions(baseline)
                    if name in row and pandas.notna(row[name])
                },
                delta_p=float(delta) if pandas.notna(delta) else None,
                history=histories.get(row["trial"], ()),
                status=row["status"],
                reason=row["error"],
                seed=int(row["seed"]),
                digest=row["digest"],
            )
        )
    varied = [name for name in PARAMETERS if len({run.parameters[name] for run in runs}) > 1]
    named = list(table["row"]) if "row" in table else [""] * len(runs)
    names = [
        row or _configuration(policy, run.parameters, varied)
        for run, row, policy in zip(runs, named, table["policy"], strict=True)
    ]
    if "schedule" in table:
        names = [
            f"the schedule of rank {rank}" if len(schedule) > 1 else name
            for name, rank, schedule in zip(names, table["rank"], table["schedule"], strict=True)
        ]
    if "settings" in table:
        names = _told_apart(names, list(table["settings"]))
    return [
        dataclasses.replace(run, configuration=name) for run, name in zip(runs, names, strict=True)
    ]


def _told_apart(names: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The names of configurations. Where one name has several settings, these are added to it."""
    settings_by_name: dict[str, set[str]] = {}
    for name, setting in zip(names, settings, strict=True):
        settings_by_name.setdefault(name, set()).add(setting)
    return [
        f"{name}, {setting}" if setting and len(settings_by_name[name]) > 1 else name
        for name, setting in zip(names, settings, strict=True)
    ]


def _run(
    policy: str,
    values: Any,
    baseline: Mapping[str, float],
    *,
    method: str,
    metrics: Mapping[str, float],
    **fields: Any,
) -> Run:
    """A run of a benchmark or a search.

    Args:
        policy: its name.
        values: "log_losses", "lambda_tsr", "lambda_csa", "tau", "share" and "learning_rate".
        baseline: single-task metrics that gains are relative to.
        method, metrics, fields: of the run.
    """
    parameters = {
        "losses": "log" if values["log_losses"] else "plain",
        "lambda_tsr": float(values["lambda_tsr"]),
        "lambda_csa": float(values["lambda_csa"]),
        "tau": float(values["tau"]) if values["lambda_csa"] else None,
        "share": float(values["share"]) if pandas.notna(values.get("share")) else None,
        "learning rate": float(values["learning_rate"]),
    }
    is_complete = all(name in metrics for name in directions(baseline))
    return Run(
        method=method,
        configuration=method,
        parameters=parameters,
        metrics=metrics,
        gains=gains_by_task(metrics, baseline) if is_complete else {},
        is_reference=_is_reference(policy, parameters),
        **fields,
    )


def _is_reference(policy: str, parameters: Mapping[str, Any]) -> bool:
    return (
        policy in ("EW", "Constant") and parameters["lambda_tsr"] == parameters["lambda_csa"] == 0
    )


def _configuration(policy: str, parameters: Mapping[str, Any], varied: Sequence[str]) -> str:
    """A trial's policy and the parameters that differ among the trials: "UW (log losses, tau 0.5)"."""
    texts = []
    for name in varied:
        value = parameters[name]
        if name == "losses":
            texts.append(f"{value} losses")
        elif value or not name.startswith("lambda"):
            texts += [] if value is None else [f"{name} {value:.3g}"]
    if parameters["lambda_tsr"] == parameters["lambda_csa"] == 0:
        texts.append("no penalties")
    return f"{policy} ({', '.join(texts)})" if texts else policy


def gains_by_task(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """By task, the mean relative gain of its metrics over the baseline, in percent."""
    metrics_by_task: dict[str, dict[str, float]] = {}
    for name in directions(metrics):
        metrics_by_task.setdefault(name.rpartition("/")[0], {})[name] = metrics[name]
    return {task: delta_p(own, baseline).task for task, own in metrics_by_task.items()}


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the front: no other is at least as large in all and larger in one."""
    return [
        not any(
            all(o >= p for o, p in zip(other, point, strict=True)) and tuple(other) != tuple(point)
            for other in points
        )
        for point in points
    ]


def best_by_penalties(runs: Sequence[Run]) -> dict[tuple[float, float], Run]:
    """The run with the largest delta_p at each (lambda_tsr, lambda_csa).

    A run that was stopped early stands for its place only where no other was trained there.
    """
    best: dict[tuple[float, float], Run] = {}
    ranked = sorted(
        finished(runs), key=lambda run: (run.status != "stopped", _delta_p(run)), reverse=True
    )
    for run in ranked:
        best.setdefault((run.parameters["lambda_tsr"], run.parameters["lambda_csa"]), run)
    return best


def trained_to_the_end(configurations: Sequence[str], statuses: Sequence[str]) -> set[str]:
    """The configurations of which no run was stopped early; all, where that leaves none.

    A run that was stopped early has trained for fewer epochs than those it is compared with.

    Args:
        configurations, statuses: of every run that has a result.
    """
    pairs = zip(configurations, statuses, strict=True)
    stopped = {configuration for configuration, status in pairs if status == "stopped"}
    return (set(configurations) - stopped) or set(configurations)


def finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that have a result and did not fail."""
    return [run for run in runs if run.status != "failed" and run.delta_p is not None]


def _delta_p(run: Run) -> float:
    assert run.delta_p is not None, "only of finished runs"
    return run.delta_p


def conclusion(runs: Sequence[Run]) -> str:
    """The answer of a benchmark or a search in one sentence.

    It names the configuration with the largest mean delta_p, compares it with the best reference (EW
    without penalties; without one, with the second best), and says whether the deviation over seeds
    allows a conclusion: a difference is clear where `difference_p` is below `LEVEL`. Configurations of
    which a run was stopped early are left out (`trained_to_the_end`).
    """
    ended = finished(runs)
    compared = trained_to_the_end(
        [run.configuration for run in ended], [run.status for run in ended]
    )
    num_left_out = len({run.configuration for run in ended} - compared)
    text = _conclusion([run for run in ended if run.configuration in compared])
    if not num_left_out:
        return text
    several = "configurations" if num_left_out > 1 else "configuration"
    return f"{text} This leaves out {num_left_out} {several} of which a run was stopped early."


def _conclusion(runs: Sequence[Run]) -> str:
    by_seed: dict[str, dict[int, float]] = {}
    references = set()
    for run in runs:
        # A configuration that is drawn twice with one seed tells nothing of the deviation over seeds.
        by_seed.setdefault(run.configuration, {})[run.seed] = _delta_p(run)
        if run.is_reference:
            references.add(run.configuration)
    values = {configuration: list(own.values()) for configuration, own in by_seed.items()}
    if not values:
        return "No run has a result, so nothing can be concluded; the reasons are in the table of runs."
    ordered = sorted(values, key=lambda name: fmean(values[name]), reverse=True)
    best = ordered[0]
    if len(ordered) == 1:
        return (
            f"{best} has delta_p {_mean(values[best])}; nothing can be concluded, because there is "
            "no other configuration to compare it with."
        )
    if best in references:
        other, role, note = ordered[1], "the second best", ", itself a reference,"
    else:
        other = next((name for name in ordered if name in references), ordered[1])
        role = "the best reference" if other in references else "the second best"
        note = ""
    difference = fmean(values[best]) - fmean(values[other])
    return (
        f"{best}{note} has the largest delta_p, {_mean(values[best])}; that is {difference:.2f} points "
        f"more than {role}, {other}, with {_mean(values[other])}; "
        f"{_verdict(difference, best, other, values)}."
    )


def _mean(values: Sequence[float]) -> str:
    mean = f"{fmean(values):+.2f}"
    return f"{mean} %" if len(values) == 1 else f"{mean} ± {stdev(values):.2f} %"


def _verdict(
    difference: float, best: str, other: str, values: Mapping[str, Sequence[float]]
) -> str:
    if min(len(values[best]), len(values[other])) < 2:
        return (
            "with one seed the deviation over seeds is unknown, so nothing can be concluded until both "
            "are repeated with other seeds"
        )
    deviation, freedom = pooled_deviation(list(values.values()))
    p_value = difference_p(
        difference, len(values[best]), len(values[other]), deviation, freedom, len(values)
    )
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    facts = (
        f"runs of one configuration deviate by {deviation:.2f} points over seeds, and the best of "
        f"{len(values)} configurations was chosen afterwards ({shown} by Tukey and Kramer)"
    )
    if p_value < LEVEL:
        return f"{facts}, so the difference is clear"
    return f"{facts}, so it may come from the seeds and nothing can be concluded"


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The deviation within groups of which each has its own mean, and its degrees of freedom.

    With two or three seeds, the deviation of one configuration alone is too small by chance too often.

    Args:
        groups: values by configuration; of at least one there are two.
    """
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(math.fsum((value - fmean(group)) ** 2 for value in group) for group in groups)
    return math.sqrt(squares / freedom), freedom


def difference_p(
    difference: float,
    num_best: int,
    num_other: int,
    deviation: float,
    freedom: int,
    num_configurations: int,
) -> float:
    """The p-value of a difference of two means out of several, when the pair was chosen by its means.

    Args:
        difference: of the means; at least 0.
        num_best, num_other: values that each mean is of.
        deviation, freedom: of `pooled_deviation`.
        num_configurations: out of which the two were chosen; at least 2.

    Source:
        Kramer, Biometrics 12, 1956: the studentised range, for groups of unequal size. It holds for
        deviations that are about equal in all configurations.
    """
    if deviation == 0:
        return 0.0 if difference > 0 else 1.0
    from scipy.stats import studentized_range  # here, because it takes long to load

    error = deviation * math.sqrt((1 / num_best + 1 / num_other) / 2)
    return float(studentized_range.sf(difference / error, num_configurations, freedom))
