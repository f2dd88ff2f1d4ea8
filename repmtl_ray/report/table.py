"""The results table as text: for the terminal and for Markdown.

Owns which columns are shown, under which names and with how many digits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas

HEADINGS = {
    "rank": "rank",
    "status": "status",
    "policy": "policy",
    "log_losses": "log losses",
    "lambda_tsr": "lambda_tsr",
    "lambda_csa": "lambda_csa",
    "tau": "tau",
    "learning_rate": "lr",
    "epoch": "epoch",
    "segmentation/miou": "mIoU %",
    "segmentation/pixel_accuracy": "pixel acc. %",
    "depth/abs_error": "abs. err.",
    "depth/rel_error": "rel. err.",
    "delta_p_task": "delta_p %",
    "delta_p_metric": "delta_p (metrics) %",
}
DIGITS = {"abs_error": 4, "miou": 2, "pixel_accuracy": 2, "rel_error": 2, "accuracy": 2}


def results_text(
    table: pandas.DataFrame,
    baseline: Mapping[str, float],
    metrics: Sequence[str],
    *,
    markdown: bool = False,
) -> str:
    """A search's table with its single-task row below, and the reasons of failed trials.

    Args:
        table: from `repmtl_ray.search`.
        baseline: single-task metrics.
        metrics: which of them to show, in order.
        markdown: pipes between the cells instead of aligned columns.
    """
    settings = ["rank", "delta_p_task", "policy", "log_losses", "lambda_tsr", "lambda_csa", "tau"]
    if table["learning_rate"].nunique() > 1:
        settings.append("learning_rate")
    if (table["status"] != "done").any():
        settings += ["epoch", "status"]
    columns = [*settings, *metrics]
    table = table.reindex(columns=[*columns, "error"])
    table["tau"] = table["tau"].astype(object).where(table["lambda_csa"] > 0, None)  # of CSA alone
    cells = [[_cell(column, row[column]) for column in columns] for _, row in table.iterrows()]
    single = dict.fromkeys(columns, "")
    single |= {"rank": "-", "policy": "single-task", "delta_p_task": "0.00"}
    single |= {name: _cell(name, baseline.get(name)) for name in metrics}
    cells.append([single[column] for column in columns])
    text = _layout([HEADINGS.get(column, column) for column in columns], cells, markdown)
    failures = [
        f"rank {row['rank']}: {row['error']}" for _, row in table.iterrows() if row["error"]
    ]
    if markdown and failures:  # without the empty line they would be rows of the table
        failures = ["", *(f"- {failure}" for failure in failures)]
    return "\n".join([text, *failures])


def _cell(column: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pandas.isna(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and column not in ("epoch", "rank"):
        if column.startswith("delta_p"):
            return f"{value:+.2f}"
        digits = DIGITS.get(column.rsplit("/", 1)[-1])
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"
    return str(int(value)) if isinstance(value, float) else str(value)


def aligned(headings: list[str], cells: list[list[str]]) -> str:
    """Rows of cells under their headings, in columns of equal width."""
    return _layout(headings, cells, markdown=False)


def _layout(headings: list[str], cells: list[list[str]], markdown: bool) -> str:
    if markdown:
        rows = [headings, ["---"] * len(headings), *cells]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(len(row[i]) for row in [headings, *cells]) for i in range(len(headings))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [headings, *cells]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
