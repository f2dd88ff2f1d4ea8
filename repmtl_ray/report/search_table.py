"""The table of a search as text: for the terminal and for Markdown.

Owns which columns of the search's table are shown, and the means over seeds.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import pandas

from repmtl_ray.delta import directions
from repmtl_ray.report import table as tables
from repmtl_ray.report.runs import conclusion, search_runs, trained_to_the_end

SETTINGS = (
    *("policy", "log_losses", "lambda_tsr", "lambda_csa", "tau", "share", "learning_rate"),
    "settings",
)
"""Columns that say what was trained, in the order in which they are shown."""


def configurations(table: pandas.DataFrame) -> pandas.Series:
    """What every run of a search's table was, but for its seed: equal texts are one configuration."""
    texts = [
        json.dumps(
            [row, {k: v for k, v in config.items() if k != "seed"}], default=str, sort_keys=True
        )
        for row, config in zip(table["row"], table["config"], strict=True)
    ]
    return pandas.Series(texts, index=table.index, dtype=object)


def best_run(table: pandas.DataFrame) -> pandas.Series | None:
    """The best run of the configuration whose mean delta_p over its seeds is the largest: one lucky
    seed makes no configuration the best. A configuration of which a run was stopped early is the best
    only where there is no other.

    Args:
        table: of a search, the largest delta_p first.

    Returns:
        A row of the table; None without any run that has a delta_p.
    """
    ended = _ended(table)
    if ended.empty:
        return None
    keys = configurations(ended)
    compared = keys.isin(trained_to_the_end(list(keys), list(ended["status"])))
    ended, keys = ended[compared], keys[compared]
    means = ended["delta_p_task"].groupby(keys, sort=False).mean()
    return ended.loc[keys[keys == means.idxmax()].index[0]]


def seeds_text(
    table: pandas.DataFrame, baseline: Mapping[str, float], metrics: Sequence[str]
) -> str | None:
    """A search's table by configuration: means and deviations over seeds, the largest delta_p first.

    Args:
        table, baseline, metrics: as for `search_text`.

    Returns:
        Aligned columns, and the reasons of failed runs below; None where no configuration has two
        runs, where some were stopped early (means over different epochs say nothing), and where the
        table marks a Pareto front, which is one of runs, or has schedules.
    """
    ended = _ended(table)
    groups = [own for _, own in ended.groupby(configurations(ended), sort=False)]
    is_of_runs = bool({"pareto", "schedule"} & set(table)) or (ended["status"] != "done").any()
    if is_of_runs or all(len(own) < 2 for own in groups):
        return None
    groups.sort(key=lambda own: fmean(own["delta_p_task"]), reverse=True)
    shown = _shown(ended).astype(object)  # plain values, not NumPy's
    columns = [name for name in SETTINGS if name in shown]
    numbers = ["delta_p_task", *metrics]
    rows = []
    for own in groups:
        first = shown.loc[own.index[0]]
        means = [_mean(name, list(own[name])) for name in numbers]
        rows.append(
            [means[0], str(len(own)), *(_cell(name, first[name]) for name in columns), *means[1:]]
        )
    alone = [_cell(name, baseline.get(name)) for name in metrics]
    rows.append(["0.00", "", "single-task", *[""] * (len(columns) - 1), *alone])
    heads = tables.headings([*numbers, *columns])
    named = [heads[0], "seeds", *heads[len(numbers) :], *heads[1 : len(numbers)]]
    failed = table[table["error"] != ""]
    failures = [f"{r['policy']}, seed {r['seed']}: {r['error']}" for _, r in failed.iterrows()]
    return "\n".join([tables.aligned(named, rows), *failures])


def search_text(
    table: pandas.DataFrame,
    baseline: Mapping[str, float],
    metrics: Sequence[str],
    *,
    markdown: bool = False,
) -> str:
    """A search's table with its single-task row at the end, and the reasons of failed trials below.

    Args:
        table: from `repmtl_ray.search`.
        baseline: single-task metrics.
        metrics: which of them are shown, in this order.
        markdown: Markdown instead of aligned columns.
    """
    shown = _shown(table)
    columns = ["rank", "delta_p_task", *(name for name in SETTINGS if name in shown)]
    if table.get("seed", pandas.Series(dtype=int)).nunique() > 1:
        columns.append("seed")
    if (table["status"] != "done").any():
        columns += ["epoch", "status"]
    if "pareto" in table:
        columns.append("pareto")
    columns += metrics
    kept = ["error", *(["epoch", "schedule"] if "schedule" in shown else [])]
    table = shown.reindex(columns=[*columns, *(name for name in kept if name not in columns)])
    rows = [[_cell(name, row[name]) for name in columns] for _, row in table.iterrows()]
    single_task = {
        "rank": "-",
        "policy": "single-task",
        "delta_p_task": "0.00",
        **{name: _cell(name, baseline.get(name)) for name in metrics},
    }
    rows.append([single_task.get(name, "") for name in columns])
    write = tables.markdown if markdown else tables.aligned
    failures = [
        f"rank {row['rank']}: {row['error']}" for _, row in table.iterrows() if row["error"]
    ]
    lines = [*schedule_lines(table), *failures]
    if markdown and lines:  # without the empty line they would be rows of the table
        lines = ["", *(f"- {line}" for line in lines)]
    return "\n".join([write(tables.headings(columns), rows), *lines])


def schedule_lines(table: pandas.DataFrame) -> list[str]:
    """Of every trial that changed in mid-run: which trial trained its weights, when, with which values."""
    lines = []
    for _, row in table.iterrows() if "schedule" in table else ():
        entries = row["schedule"]
        ends = [*(entry["first_epoch"] - 1 for entry in entries[1:]), int(row["epoch"] or 0)]
        parts = []
        for entry, end in zip(entries, ends, strict=True) if len(entries) > 1 else ():
            first = entry["first_epoch"]
            epochs = f"epoch {first}" if first == end else f"epochs {first}-{end}"
            by = "" if entry["rank"] == row["rank"] else f" by rank {entry['rank']}"
            values = (
                f"{path.rpartition('.')[2]} {_short(v)}" for path, v in entry["values"].items()
            )
            parts.append(f"{epochs}{by} with {', '.join(values)}")
        lines += [f"rank {row['rank']}: {'; '.join(parts)}"] if parts else []
    return lines


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def answer(table: pandas.DataFrame, baseline: Mapping[str, float]) -> str:
    """The table, by configuration where there are several seeds, and what may be concluded from it.

    Args:
        table, baseline: as for `search_text`.
    """
    metrics = list(directions(baseline))
    by_configuration = seeds_text(table, baseline, metrics)
    text = by_configuration or search_text(table, baseline, metrics)
    return f"{text}\n\n{textwrap.fill(conclusion(search_runs(table, baseline, {})), 100)}"


def _ended(table: pandas.DataFrame) -> pandas.DataFrame:
    return table[(table["status"] != "failed") & table["delta_p_task"].notna()]


def _shown(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table with names of rows as policies, and without the settings that say nothing."""
    if "row" in table:
        table = table.assign(policy=table["row"].where(table["row"] != "", table["policy"]))
    # The temperature belongs to CSA alone.
    table = table.assign(tau=table["tau"].astype(object).where(table["lambda_csa"] > 0, None))
    if "share" in table and not table["share"].notna().any():
        table = table.drop(columns="share")
    if "settings" in table:
        # What all draws have in common, and what a row's name stands for, says nothing.
        is_draw = table["row"] == ""
        if table.loc[is_draw, "settings"].nunique() > 1:
            table = table.assign(settings=table["settings"].where(is_draw, ""))
        else:
            table = table.drop(columns="settings")
    return table if table["learning_rate"].nunique() > 1 else table.drop(columns="learning_rate")


def _mean(name: str, values: Sequence[float]) -> str:
    mean = tables.number(name, fmean(values))
    return (
        mean if len(values) < 2 else f"{mean} ± {tables.number(name, stdev(values), signed=False)}"
    )


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pandas.isna(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(int(value)) if name in ("epoch", "rank") else tables.number(name, value)
    return str(value)
