"""The table of a search as text: for the terminal and for Markdown.

Owns which columns of the search's table are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas

from repmtl_ray.report import table as tables


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
    columns = ["rank", "delta_p_task", "policy", "log_losses", "lambda_tsr", "lambda_csa", "tau"]
    if "share" in table and table["share"].notna().any():
        columns.append("share")
    if table.get("seed", pandas.Series(dtype=int)).nunique() > 1:
        columns.append("seed")
    if table["learning_rate"].nunique() > 1:
        columns.append("learning_rate")
    if (table["status"] != "done").any():
        columns += ["epoch", "status"]
    if "pareto" in table:
        columns.append("pareto")
    columns += metrics
    if "row" in table:
        table = table.assign(policy=table["row"].where(table["row"] != "", table["policy"]))
    table = table.reindex(columns=[*columns, "error"])
    # The temperature belongs to CSA alone.
    table["tau"] = table["tau"].astype(object).where(table["lambda_csa"] > 0, None)
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
    if markdown and failures:  # without the empty line they would be rows of the table
        failures = ["", *(f"- {failure}" for failure in failures)]
    return "\n".join([write(tables.headings(columns), rows), *failures])


def _cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pandas.isna(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(int(value)) if name in ("epoch", "rank") else tables.number(name, value)
    return str(value)
