"""The report of a benchmark or a search as one HTML file that opens offline.

Owns what is shown and in which order: the conclusion, the table of methods, charts, the table of
runs, pictures of a checkpoint, the configuration and the environment. What a chart shows is in
`charts.py`; the template, the style and the script are in `page/`.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas

from repmtl_ray.config import Experiment, to_dict
from repmtl_ray.delta import directions
from repmtl_ray.report import benchmark_table
from repmtl_ray.report.charts import Chart, make_charts
from repmtl_ray.report.records import Record, Summary
from repmtl_ray.report.runs import PARAMETERS, Run, benchmark_runs, conclusion, search_runs
from repmtl_ray.report.table import headings, number

WIDE_PICTURE = 900
"""Pixels above which a picture scrolls sideways on a phone and is not shrunk."""
SEARCH_NOTES = (
    "delta_p is over tasks, in percent, against single-task training with the same protocol; metrics "
    "are those of a trial's last epoch.",
    "The best of many trials was chosen by the numbers that are shown, so its delta_p is optimistic.",
)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of one checkpoint.

    Args:
        of: which checkpoint.
        images: PNGs by title.
    """

    of: str
    images: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class TableCell:
    """One cell of a table on the page.

    Args:
        text: what is read.
        value: what the column is sorted by; None takes the text.
        lines: smaller lines below the text.
        kind: "best", "second" or nothing.
    """

    text: str
    value: float | None = None
    lines: tuple[str, ...] = ()
    kind: str = ""

    @property
    def sort_key(self) -> str:
        return self.text if self.value is None else repr(self.value)


@dataclass(frozen=True)
class Table:
    """A table on the page: headings, and rows of as many cells."""

    headings: Sequence[str]
    rows: Sequence[Sequence[TableCell]]


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
    failed_runs = [
        Run(name=name, method=name, configuration=name, parameters=dict.fromkeys(PARAMETERS),
            metrics={}, delta_p=None, gains={}, status="failed", reason=reason)
        for name, reason in summary.failures.items()
    ]  # fmt: skip
    by_run = dict.fromkeys(("seed", "policy", "regularizer"), "see the table of runs")
    commits = sorted({str(record["commit"]) for record in records})
    return _render(
        title=title,
        subtitle=benchmark_table.title(summary),
        facts=[
            f"protocol {summary.protocol}",
            f"{summary.reported_split} split",
            f"{len(records)} runs",
            *(f"code {commit}" for commit in commits),
        ],
        notes=benchmark_table.notes(summary),
        methods=_methods_table(summary),
        runs=[*benchmark_runs(records, summary.baseline_means), *failed_runs],
        metrics=summary.metrics,
        pictures=pictures,
        experiment=dict(records[0]["experiment"]) | by_run,
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
        title: names the data.
        histories: by trial, one row per epoch.
        pictures: of checkpoints.
        notes: on the data.
    """
    metrics = list(directions(baseline))
    single_task = ", ".join(
        f"{heading} {number(name, baseline[name])}"
        for name, heading in zip(metrics, headings(metrics), strict=True)
    )
    return _render(
        title="Search of Rep-MTL's coefficients and policy",
        subtitle=title,
        facts=[
            f"{len(table)} trials",
            f"protocol {experiment.protocol}",
            f"{experiment.epochs} epochs",
        ],
        notes=[f"Single-task training: {single_task}.", *SEARCH_NOTES, *notes],
        methods=None,
        runs=search_runs(table, baseline, histories),
        metrics=metrics,
        pictures=pictures,
        experiment=to_dict(experiment),
    )


def _render(
    *, runs: Sequence[Run], metrics: Sequence[str], pictures: Sequence[Pictures],
    experiment: Mapping[str, Any], **context: Any,
) -> str:  # fmt: skip
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    templates = Environment(
        loader=PackageLoader("repmtl_ray.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = make_charts(runs, metrics)
    run_table, same_in_all = _runs_table(runs, metrics)
    return templates.get_template("report.html").render(
        **context,
        conclusion=conclusion(runs),
        charts=charts,
        chart_data=Markup(_chart_json(charts)),
        run_table=run_table,
        same_in_all=same_in_all,
        pictures=[
            (group.of, [_picture(*item) for item in group.images.items()]) for group in pictures
        ],
        details={
            "Configuration": json.dumps(experiment, indent=2),
            "Environment": json.dumps(environment(), indent=2),
        },
        plotly=Markup(get_plotlyjs()) if charts else "",
    )


def _chart_json(charts: Sequence[Chart]) -> str:
    """By chart the figures of its choices, in order; safe inside a script element."""
    lists = (f"[{','.join(figure.to_json() for figure in c.figures.values())}]" for c in charts)
    return f"[{','.join(lists)}]".replace("<", r"\u003c")


def _methods_table(summary: Summary) -> Table:
    names = benchmark_table.columns(summary)
    rows = []
    for row, cells in zip(summary.rows, benchmark_table.cells(summary), strict=True):
        seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}" if row.seeds else ""
        line = [TableCell(benchmark_table.method_name(row), None, (seeds,) if seeds else ())]
        for name in names:
            cell = cells[name]
            lines = [f"± {cell.deviation}"] if cell.deviation else []
            lines += [f"[{cell.published}]"] if cell.published else []
            value = row.values[name].mean if name in row.values else None
            kind = {1: "best", 2: "second"}.get(cell.place, "")
            line.append(TableCell(cell.mean, value, tuple(lines), kind))
        rows.append(line)
    return Table(["method", *headings(names)], rows)


def _runs_table(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[Table, list[str]]:
    """Every run with the columns that tell runs apart, and the parameters that all runs share."""
    columns: dict[str, list[TableCell]] = {
        "run": [TableCell(run.name, None, _run_lines(run)) for run in runs],
        "delta_p %": [_number_cell("delta_p_task", run.delta_p) for run in runs],
    }
    for name, heading in zip(metrics, headings(metrics), strict=True):
        columns[heading] = [_number_cell(name, run.metrics.get(name)) for run in runs]
    same_in_all = []
    for name in (*PARAMETERS, "seed"):
        values = [run.seed if name == "seed" else run.parameters[name] for run in runs]
        if len(set(values)) > 1:
            columns[name] = [
                TableCell(value) if isinstance(value, str) else _number_cell(name, value)
                for value in values
            ]
        elif values and values[0] is not None:
            same_in_all.append(f"{name} {values[0]}")
    return Table(list(columns), list(zip(*columns.values(), strict=True))), same_in_all


def _run_lines(run: Run) -> tuple[str, ...]:
    """The digest of a run's configuration, and its status unless it is done."""
    status = f"{run.status}: {run.reason}" if run.reason else run.status
    lines = (run.digest, "" if status == "done" else status)
    return tuple(line for line in lines if line)


def _number_cell(name: str, value: float | None) -> TableCell:
    if value is None:
        return TableCell("")
    text = str(value) if isinstance(value, int) else number(name, value)
    return TableCell(text, float(value))


def _picture(title: str, png: bytes) -> dict[str, Any]:
    width, height = struct.unpack(">II", png[16:24])  # of the PNG's first chunk
    return {
        "title": title,
        "width": width,
        "height": height,
        "is_wide": width > WIDE_PICTURE,
        "data": base64.b64encode(png).decode(),
    }


def environment() -> dict[str, str]:
    """The versions, the processor and the accelerators that the report was made with."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    values = {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "accelerators": ", ".join(gpus) or "none",
    }
    for name in ("repmtl_ray", "torch", "timm", "torchjd", "ray", "numpy"):
        try:
            values[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values[name] = "not installed"
    return values
