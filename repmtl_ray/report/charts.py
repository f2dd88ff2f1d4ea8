"""The interactive charts of the report, as plotly figures.

Owns what each chart shows. Colours of text, grid and background follow the page's colour scheme and
are set by the page's script (`page/report.js`). plotly is imported when a chart is made, not before.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from repmtl_ray.delta import directions
from repmtl_ray.report.heatmap import MAX_CELLS
from repmtl_ray.report.runs import PARAMETERS, Run, best_by_penalties, finished, pareto_front
from repmtl_ray.report.table import headings

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PALETTE = (
    *("#3b82c4", "#e0743a", "#3a9e5c", "#a066c8", "#b8930f"),
    *("#d6568f", "#2ba3ad", "#8a7863", "#6f83e0", "#8f9e1e"),
)
"""Colours of the methods, readable on white and on dark grey."""
DIVERGING = ((0.0, "#c0392b"), (0.5, "#a9b0b7"), (1.0, "#1f6fb2"))
"""Worse than single-task training, equal, better."""
ALL_TASKS = "all tasks"
MAX_PAIRED_TASKS = 8
MAX_LEGEND = 12
"""Methods up to which a chart has a legend; with more, pointing at a mark names it."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page.

    Args:
        title: above it.
        figures: by the choice that shows them; a single one has no choices.
        caption: below it.
        height: in pixels, at least.
        is_wide: whether it takes the whole width of the page.
        min_width: in pixels; on a narrower screen the chart scrolls sideways.
    """

    title: str
    figures: Mapping[str, Figure]
    caption: str
    height: int = 380
    is_wide: bool = False
    min_width: int = 0


def make_charts(runs: Sequence[Run], metrics: Sequence[str]) -> list[Chart]:
    """All charts of the runs that have a result; none if no run has.

    Args:
        runs: of a benchmark or a search.
        metrics: "<task>/<metric>", in the order of the tables.
    """
    runs = finished(runs)
    if not runs:
        return []
    methods = dict.fromkeys(run.method for run in runs)
    colors = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(methods)}
    made = [
        delta_p_chart(runs, colors),
        task_chart(runs, colors),
        curve_chart(runs, metrics, colors),
        penalty_chart(runs),
        parallel_chart(runs, metrics),
    ]
    charts = [chart for chart in made if chart is not None]
    narrow = [chart for chart in charts if not chart.is_wide]
    if len(narrow) % 2:  # two narrow charts stand side by side; nobody stands beside the last one
        charts[charts.index(narrow[-1])] = dataclasses.replace(narrow[-1], is_wide=True)
    return charts


def delta_p_chart(runs: Sequence[Run], colors: Mapping[str, str]) -> Chart:
    """delta_p of every run, one row per method."""
    traces = []
    for method, color in colors.items():
        own = [run for run in runs if run.method == method]
        values = [run.delta_p for run in own if run.delta_p is not None]
        mean = sum(values) / len(values)
        marks = (
            (values, [f"{run.name}: {run.delta_p:+.2f} %" for run in own], "circle", 9),
            ([mean], [f"mean of {method}: {mean:+.2f} %"], "line-ns-open", 20),
        )
        for x, texts, symbol, size in marks:
            marker = {"color": color, "symbol": symbol, "size": size, "opacity": 0.75}
            marker["line"] = {"color": color, "width": 3 if symbol != "circle" else 0}
            names = [_plain(method)] * len(x)
            traces.append(_dots(x, names, texts, marker=marker))
    figure = _figure(traces, x="delta_p over tasks, %", y="")
    figure.update_xaxes(zeroline=True, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return Chart(
        title="delta_p by method",
        figures={"": figure},
        caption="A dot per run, a bar at their mean; 0 is single-task training.",
        height=max(380, 110 + 28 * len(colors)),
        is_wide=len(colors) > MAX_LEGEND,
    )


def task_chart(runs: Sequence[Run], colors: Mapping[str, str]) -> Chart | None:
    """The gains of two tasks against each other, with the Pareto front over all tasks.

    With more than `MAX_PAIRED_TASKS` tasks, every task is against the mean of all.
    """
    tasks = list(runs[0].gains)
    if len(tasks) < 2:
        return None
    runs = [run for run in runs if len(run.gains) == len(tasks)]
    points = [[run.gains[task] for task in tasks] for run in runs]
    front = {run.name for run, marked in zip(runs, pareto_front(points), strict=True) if marked}
    pairs = list(itertools.combinations(tasks, 2))
    if len(tasks) > MAX_PAIRED_TASKS:
        pairs = [(task, ALL_TASKS) for task in tasks]
    return Chart(
        title="Tasks against each other",
        figures={
            f"{one} and {other}": _task_figure(runs, colors, (one, other), front, len(tasks) == 2)
            for one, other in pairs
        },
        caption=(
            "Gain over single-task training, which is at (0, 0). Diamonds: the Pareto front over all "
            "tasks, where no run is better in one task and as good in all others."
        ),
    )


def _task_figure(
    runs: Sequence[Run],
    colors: Mapping[str, str],
    pair: tuple[str, str],
    front: set[str],
    has_line: bool,
) -> Figure:
    gains = {
        run.name: [{**run.gains, ALL_TASKS: run.delta_p}[task] for task in pair] for run in runs
    }
    traces = []
    if has_line:
        line = sorted(gains[name] for name in front)
        style = {"dash": "dot", "width": 1.5, "color": "#8a94a0"}
        x, y = zip(*line, strict=True)
        traces.append(_dots(x, y, [], mode="lines", line=style, hoverinfo="skip"))
    for method in dict.fromkeys(run.method for run in runs):
        names = [run.name for run in runs if run.method == method]
        marker = {
            "color": colors[method],
            "size": 11,
            "opacity": [1.0 if name in front else 0.5 for name in names],
            "symbol": ["diamond" if name in front else "circle" for name in names],
        }
        x, y = zip(*(gains[name] for name in names), strict=True)
        texts = [
            f"{name}: {pair[0]} {gains[name][0]:+.2f} %, {pair[1]} {gains[name][1]:+.2f} %"
            for name in names
        ]
        traces.append(_dots(x, y, texts, marker=marker, name=method))
    figure = _figure(traces, x=f"{pair[0]}: gain, %", y=f"{pair[1]}: gain, %", legend=len(colors))
    figure.update_xaxes(zeroline=True, rangemode="tozero")
    figure.update_yaxes(zeroline=True, rangemode="tozero")
    return figure


def curve_chart(
    runs: Sequence[Run], metrics: Sequence[str], colors: Mapping[str, str]
) -> Chart | None:
    """Every metric over the epochs, one line per run."""
    names = dict.fromkeys(metrics)
    for row in itertools.chain.from_iterable(run.history for run in runs):
        names |= dict.fromkeys(
            name for name in row if name.endswith(("train_loss", "/loss")) or "rep_mtl/" in name
        )
    figures = {}
    for name, heading in zip(names, headings(list(names)), strict=True):
        traces: list[dict[str, Any]] = []
        for run in runs:
            points = [
                (row["epoch"], float(f"{row[name]:.6g}"))
                for row in run.history
                if _is_number(row.get(name))
            ]
            if points:
                x, y = zip(*points, strict=True)
                is_first = all(trace["legendgroup"] != _plain(run.method) for trace in traces)
                traces.append(
                    _dots(x, y, run.name, name=run.method, hoverinfo="x+y+text")
                    | {"mode": "lines+markers" if len(points) < 30 else "lines"}
                    | {"legendgroup": _plain(run.method), "showlegend": is_first}
                    | {"line": {"color": colors[run.method], "width": 2}, "marker": {"size": 5}}
                )
        if traces:
            figures[heading] = _figure(traces, x="epoch", y=heading, legend=len(colors))
    if not figures:
        return None
    return Chart(
        title="Curves",
        figures=figures,
        caption="A line per run; metrics are over the evaluation split. Click a name to hide its runs.",
    )


def penalty_chart(runs: Sequence[Run]) -> Chart | None:
    """The best delta_p at each (lambda_tsr, lambda_csa); none if all runs have the same."""
    best = best_by_penalties(runs)
    if len(best) < 2:
        return None
    xs, ys = sorted({tsr for tsr, _ in best}), sorted({csa for _, csa in best})
    limit = max(abs(run.delta_p or 0.0) for run in best.values()) or 1.0
    scale = {
        "colorscale": DIVERGING,
        "colorbar": {"title": {"text": "delta_p %", "side": "right"}, "thickness": 12},
    }
    texts = {place: f"{run.name}: delta_p {run.delta_p:+.2f} %" for place, run in best.items()}
    if max(len(xs), len(ys)) > MAX_CELLS:
        values = [run.delta_p for run in best.values()]
        marker = {"color": values, "size": 13, "cmin": -limit, "cmax": limit, **scale}
        tsr, csa = zip(*best, strict=True)
        trace = _dots(tsr, csa, list(texts.values()), marker=marker)
    else:
        rows = [[best.get((x, y)) for x in xs] for y in ys]
        trace = {
            "type": "heatmap",
            "x": [f"{x:g}" for x in xs],
            "y": [f"{y:g}" for y in ys],
            "z": [[None if run is None else run.delta_p for run in row] for row in rows],
            "hovertext": [[_plain(texts.get((x, y), "not tried")) for x in xs] for y in ys],
            "hoverinfo": "text",
            "text": [["" if run is None else f"{run.delta_p:+.1f}" for run in row] for row in rows],
            "texttemplate": "%{text}",
            "zmin": -limit,
            "zmax": limit,
            "xgap": 2,
            "ygap": 2,
            **scale,
        }
    figure = _figure([trace], x="lambda_tsr", y="lambda_csa")
    if trace["type"] == "heatmap":
        figure.update_xaxes(type="category", showgrid=False)
        figure.update_yaxes(type="category", showgrid=False)
    return Chart(
        title="delta_p over the penalties",
        figures={"": figure},
        caption="The best run of each place, whatever its policy; empty places were not tried.",
    )


def parallel_chart(runs: Sequence[Run], metrics: Sequence[str]) -> Chart:
    """Parallel coordinates: one line per run; drag along an axis to select runs."""
    from plotly import graph_objects

    is_better = directions(dict.fromkeys(metrics, 0.0))
    axes = [_dimension("method", [run.method for run in runs])]
    for name in PARAMETERS:
        values = [run.parameters[name] for run in runs]
        if len(set(values)) > 1:
            axes.append(_dimension(name, values))
    for name, heading in zip(metrics, headings(metrics), strict=True):
        values = [run.metrics[name] for run in runs]
        axes.append(_dimension(heading, values, reverse=not is_better[name]))
    delta_p = [run.delta_p for run in runs]
    axes.append(_dimension("delta_p %", delta_p))
    limit = max(abs(value or 0.0) for value in delta_p) or 1.0
    line = {"color": delta_p, "colorscale": DIVERGING, "cmin": -limit, "cmax": limit}
    trace = {"type": "parcoords", "line": line, "dimensions": axes, "labelangle": -20}
    margin = {"l": 110, "r": 50, "t": 90, "b": 24}
    layout = {"template": {}, "margin": margin, "autosize": True}
    return Chart(
        title="Parallel coordinates",
        figures={"": graph_objects.Figure([trace], layout)},
        caption=(
            "A line per run, coloured by delta_p; metrics and delta_p are better at the top. Drag along "
            "an axis to select runs, drag a name to move its axis, click an axis to clear it."
        ),
        height=400,
        is_wide=True,
        min_width=66 * len(axes) + 130,
    )


def _dimension(name: str, values: Sequence[Any], *, reverse: bool = False) -> dict[str, Any]:
    """One axis. Texts are spread evenly; a run without a value is at a place "none" below the others."""
    label = {"label": _plain(name)}
    if any(isinstance(value, str) for value in values):
        texts = sorted({str(value) for value in values})
        ticks = {"tickvals": list(range(len(texts))), "ticktext": [_plain(text) for text in texts]}
        return {**label, **ticks, "values": [texts.index(str(value)) for value in values]}
    numbers = sorted({value for value in values if value is not None})
    low, high = numbers[0], numbers[-1]
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    axis: dict[str, Any] = {**label, "tickformat": ".3~g"}
    axis["range"] = [high, low] if reverse else [low, high]
    if None in values:
        below = low - 0.15 * (high - low)
        shown = numbers if len(numbers) <= 6 else [low, high]
        axis["range"] = [below, high]
        axis |= {"tickvals": [below, *shown], "ticktext": ["none", *(f"{n:.3g}" for n in shown)]}
        return {**axis, "values": [below if value is None else value for value in values]}
    return {**axis, "values": list(values)}


def _figure(traces: Sequence[Mapping[str, Any]], *, x: str, y: str, legend: int = 0) -> Figure:
    """A figure with two axes, and a legend below if it has few enough names."""
    from plotly import graph_objects

    has_legend = 1 < legend <= MAX_LEGEND
    layout: dict[str, Any] = {
        "template": {},  # the page's script sets the colours
        "margin": {"l": 60, "r": 16, "t": 30, "b": 110 if has_legend else 50},
        "xaxis": {"title": {"text": _plain(x)}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": _plain(y)}, "zeroline": False, "automargin": True}
        | {"hoverformat": ".4~g"},
        "showlegend": has_legend,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "hovermode": "closest",
        "autosize": True,
    }
    return graph_objects.Figure(list(traces), layout)


def _dots(
    x: Sequence[Any], y: Sequence[Any], texts: Sequence[str] | str, *, name: str = "", **style: Any
) -> dict[str, Any]:
    """Points with a text per point, or one text for all of them, that is shown on pointing at them."""
    return {
        "type": "scatter",
        "x": list(x),
        "y": list(y),
        "mode": "markers",
        "hovertext": _plain(texts) if isinstance(texts, str) else [_plain(text) for text in texts],
        "hoverinfo": "text",
        "name": _plain(name),
        "showlegend": bool(name),
        **style,
    }


def _plain(text: str) -> str:
    """A text from data for plotly, which would read "<b>" as bold."""
    return escape(text, quote=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
