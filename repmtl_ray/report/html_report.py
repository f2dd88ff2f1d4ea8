"""The report of a benchmark or a search as one HTML file.

Owns what is shown and in which order: the table, every run, delta_p, curves, the tasks against each
other with their Pareto front, penalties, parallel coordinates, pictures of a checkpoint, the
configuration and the environment. How it looks is in `page.py` and `svg.py`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas

from repmtl_ray.config import Experiment, to_dict
from repmtl_ray.delta import directions
from repmtl_ray.report import benchmark_table, page, svg
from repmtl_ray.report.page import Field
from repmtl_ray.report.records import SINGLE_TASK, Record, Summary
from repmtl_ray.report.runs import PARAMETERS, Run, pareto_front, run_of_record, run_of_row


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """PNGs of a checkpoint by title, and what they are of."""

    of: str
    images: Mapping[str, bytes] = field(default_factory=dict)


def benchmark_report(
    summary: Summary,
    records: Sequence[Record],
    *,
    title: str,
    pictures: Sequence[Pictures] = (),
) -> str:
    """The report of methods over seeds.

    Args:
        summary, records: of the same runs.
        title: of the page.
        pictures: of checkpoints.
    """
    base = {name: summary.rows[0].values[name].mean for name in summary.metrics}
    runs = [run_of_record(record, base) for record in records]
    chips = [
        f"protocol {summary.protocol}",
        f"{summary.reported_split} split",
        f"{len(records)} runs",
        *({f"commit {record['commit']}" for record in records}),
    ]
    first = page.section(
        "Methods", page.notes(benchmark_table.notes(summary)), _summary_table(summary)
    )
    experiment = dict(records[0]["experiment"]) | {
        "seed": "by run",
        "policy": "by method",
        "regularizer": "by method",
    }
    failures = [
        Run(name=name, method=name, parameters={}, metrics={}, delta=None, gains={},
            status="failed", reason=reason)
        for name, reason in summary.failures.items()
    ]  # fmt: skip
    return _report(
        title=title,
        subtitle=benchmark_table.title(summary),
        chips=chips,
        first=first,
        runs=[*runs, *failures],
        metrics=summary.metrics,
        pictures=pictures,
        experiment=experiment,
    )


def search_report(
    table: pandas.DataFrame,
    baseline: Mapping[str, float],
    experiment: Experiment,
    *,
    title: str,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    pictures: Sequence[Pictures] = (),
    notes: Sequence[str] = (),
) -> str:
    """The report of a search.

    Args:
        table: of the search's result.
        baseline: single-task metrics.
        experiment: what was not searched.
        title: of the page; says which data.
        histories: by trial, one row an epoch.
        pictures: of checkpoints.
        notes: on the data.
    """
    metrics = list(directions(baseline))
    runs = [run_of_row(row, metrics, baseline, histories) for _, row in table.iterrows()]
    chips = [f"{len(runs)} trials", f"protocol {experiment.protocol}", f"seed {experiment.seed}"]
    baseline_row = "Single-task: " + ", ".join(
        f"{benchmark_table.heading(name)} {baseline[name]:.4g}" for name in metrics
    )
    return _report(
        title="Search of Rep-MTL's coefficients and policy",
        subtitle=title,
        chips=chips,
        first=page.section("Trials", page.notes([baseline_row, _SEARCH_NOTE, *notes])),
        runs=runs,
        metrics=metrics,
        pictures=pictures,
        experiment=to_dict(experiment),
    )


_SEARCH_NOTE = (
    "Every trial's last epoch, best delta_p first. delta_p is over tasks, against single-task "
    "training with the same protocol. One seed a trial: small differences mean nothing."
)


def _report(
    *,
    title: str,
    subtitle: str,
    chips: Sequence[str],
    first: str,
    runs: Sequence[Run],
    metrics: Sequence[str],
    pictures: Sequence[Pictures],
    experiment: Mapping[str, Any],
) -> str:
    done = [run for run in runs if run.status != "failed" and run.delta is not None]
    methods = list(dict.fromkeys(run.method for run in done))
    color = {method: n for n, method in enumerate(methods)}
    figures = [
        page.figure(
            "delta_p by method",
            svg.strips(
                [
                    (
                        m,
                        color[m],
                        [run.delta for run in done if run.method == m and run.delta is not None],
                    )
                    for m in methods
                ],
                x="delta_p over tasks, %",
            ),
            "A dot a run, a bar at their mean; 0 is single-task training.",
        ),
        _pareto(done, color),
        _curves(done, metrics, color),
        _penalties(done),
        _parallel(done, metrics, color),
    ]
    sections = [
        first,
        page.section("Pictures of the numbers", page.legend(methods), page.charts(*figures)),
        page.section("Every run", _runs_table(runs, metrics)),
    ]
    for seen in pictures:
        shown = [page.picture(name, png) for name, png in seen.images.items()]
        sections.append(page.section(f"What the model sees: {seen.of}", page.charts(*shown)))
    sections.append(
        page.section(
            "Configuration and environment",
            page.details("Configuration", json.dumps(experiment, indent=2)),
            page.details("Environment", json.dumps(environment(), indent=2)),
        )
    )
    return page.page(title, subtitle, chips, sections)


def _summary_table(summary: Summary) -> str:
    names = benchmark_table.columns(summary)
    rows = []
    for row, cells in zip(summary.rows, benchmark_table.cells(summary), strict=True):
        name = "single-task" if row.method == SINGLE_TASK else row.method
        count = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
        fields = [Field(name, below=count if row.seeds else "published")]
        for column in names:
            cell = cells[column]
            value = row.values[column].mean if column in row.values else ""
            kind = {1: "best", 2: "second"}.get(cell.place, "")
            below = f"published {cell.beside}" if cell.beside else ""
            fields.append(Field(cell.text, value, below, kind))
        rows.append(fields)
    return page.table(["method", *(benchmark_table.heading(name) for name in names)], rows)


def _runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    headings = [
        *("run", "status", *PARAMETERS, "seed"),
        *(benchmark_table.heading(name) for name in metrics),
        *("delta_p %", "configuration"),
    ]
    failed = any(run.reason for run in runs)
    rows = []
    for run in runs:
        fields = [Field(run.name), Field(run.status)]
        fields += [_number(run.parameters.get(name)) for name in PARAMETERS]
        fields.append(Field(str(run.seed)))
        fields += [_number(run.metrics.get(name)) for name in metrics]
        fields += [_number(run.delta, "{:+.2f}"), Field(run.digest)]
        rows.append([*fields, Field(run.reason, kind="text")] if failed else fields)
    return page.table([*headings, "reason"] if failed else headings, rows)


def _number(value: Any, form: str = "{:.4g}") -> Field:
    if value is None:
        return Field("")
    return Field(value) if isinstance(value, str) else Field(form.format(value), float(value))


def _pareto(runs: Sequence[Run], color: Mapping[str, int]) -> str:
    tasks = list(runs[0].gains) if runs else []
    whole = [run for run in runs if len(run.gains) == len(tasks)]
    on_front = pareto_front([[run.gains[task] for task in tasks] for run in whole])
    by_pair = {}
    for one, other in itertools.combinations(tasks, 2):
        dots = [
            svg.Dot(
                color[run.method],
                f"{run.name}: {one} {run.gains[one]:+.2f} %, {other} {run.gains[other]:+.2f} %",
                run.gains[one],
                run.gains[other],
                marked,
            )
            for run, marked in zip(whole, on_front, strict=True)
        ]
        by_pair[f"{one} and {other}"] = svg.scatter(
            dots,
            x=f"{one}: gain over single-task, %",
            y=f"{other}: gain, %",
            origin="single-task",
            front=len(tasks) == 2,
        )
    if not by_pair:
        return page.figure("Tasks against each other", svg.scatter([], x="", y=""))
    return page.chosen(
        "Tasks against each other",
        by_pair,
        "Outlined: the Pareto front over all tasks, where no run is better in one and as good in all.",
    )


def _curves(runs: Sequence[Run], metrics: Sequence[str], color: Mapping[str, int]) -> str:
    names = list(metrics)
    for run in runs:
        for row in run.history:
            extra = [
                n for n in row if n.endswith(("/train_loss", "/loss")) or n.startswith("rep_mtl/")
            ]
            names += [name for name in extra if name not in names]
    by_metric = {}
    for name in names:
        curves = []
        for run in runs:
            points = [
                (float(row["epoch"]), float(row[name]))
                for row in run.history
                if name in row and _is_number(row[name])
            ]
            if points:
                curves.append(svg.Line(color[run.method], run.name, points))
        if curves:
            by_metric[benchmark_table.heading(name)] = svg.lines(
                curves, x="epoch", y=benchmark_table.heading(name)
            )
    if not by_metric:
        return page.figure("Curves", svg.lines([], x="", y=""))
    return page.chosen("Curves", by_metric, "A line a run, over the split that is evaluated on.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _penalties(runs: Sequence[Run]) -> str:
    """The best delta_p at each (lambda_tsr, lambda_csa)."""
    cells: dict[tuple[float, float], tuple[float, str]] = {}
    for run in runs:
        at = run.parameters["lambda_tsr"], run.parameters["lambda_csa"]
        if run.delta is not None and (at not in cells or run.delta > cells[at][0]):
            cells[at] = run.delta, f"{run.name}: delta_p {run.delta:+.2f} %"
    if len(cells) == 1:
        return page.figure("Penalties", "", "All runs have the same lambda_tsr and lambda_csa.")
    return page.figure(
        "Penalties",
        svg.heat_map(cells, x="lambda_tsr", y="lambda_csa", unit="best delta_p, %"),
        "The best run of each cell, whatever its policy; empty cells were not tried.",
    )


def _parallel(runs: Sequence[Run], metrics: Sequence[str], color: Mapping[str, int]) -> str:
    better = directions(dict.fromkeys(metrics, 0.0))
    varied = [name for name in PARAMETERS if len({run.parameters[name] for run in runs}) > 1]
    axes = ["method", *varied, *(benchmark_table.heading(name) for name in metrics), "delta_p %"]
    rows = [
        (
            run.name,
            color[run.method],
            [
                run.method,
                *(run.parameters[name] for name in varied),
                *(run.metrics.get(name) for name in metrics),
                run.delta,
            ],
        )
        for run in runs
    ]
    down = [False] * (1 + len(varied)) + [not better[name] for name in metrics] + [False]
    return page.figure(
        "Parallel coordinates",
        svg.parallel(axes, rows, down),
        "A line a run; metrics and delta_p are better above.",
        full=True,
    )


def environment() -> dict[str, str]:
    """What the report was made with: versions, processor, accelerators."""
    import torch

    found = {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "accelerators": ", ".join(
            torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())
        )
        or "none",
    }
    for name in ("repmtl_ray", "torch", "timm", "torchjd", "ray", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
