"""The table writer: rows of texts for the terminal, Markdown and LaTeX.

Also owns how every table of this project heads a column and rounds a number. Which columns a table
has is decided in `search_table.py` and `benchmark_table.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

HEADINGS = {
    "delta_p_task": "delta_p %",
    "delta_p_metric": "delta_p (metrics) %",
    "delta_m": "delta_m %",
    "mean_rank": "mean rank",
    "log_losses": "log losses",
    "learning_rate": "lr",
    "miou": "mIoU %",
    "pixel_accuracy": "pixel acc. %",
    "abs_error": "abs. err.",
    "rel_error": "rel. err.",
    "mean_angle": "mean angle",
    "median_angle": "median angle",
    "within_11.25": "within 11.25",
    "within_22.5": "within 22.5",
    "within_30": "within 30",
    "accuracy": "acc. %",
}
DECIMALS = {
    "abs_error": 4,
    "rel_error": 4,
    **dict.fromkeys(("miou", "pixel_accuracy", "accuracy", "mean_angle", "median_angle"), 2),
    **dict.fromkeys(("within_11.25", "within_22.5", "within_30", "delta_m", "mean_rank"), 2),
    **dict.fromkeys(("delta_p_task", "delta_p_metric"), 2),
}
"""Digits after the decimal point; other metrics have four significant digits."""


def headings(names: Sequence[str]) -> list[str]:
    """Column headings: a metric's own name, with its task in front where two tasks have that metric.

    Args:
        names: of columns; metrics are "<task>/<metric>".
    """
    count = Counter(name.rpartition("/")[2] for name in names)
    texts = []
    for name in names:
        task, _, metric = name.rpartition("/")
        text = HEADINGS.get(metric, metric)
        texts.append(f"{task} {text}" if task and count[metric] > 1 else text)
    return texts


def number(name: str, value: float, *, signed: bool | None = None) -> str:
    """A number of a column with the digits of that column.

    Args:
        name: of the column.
        value: finite or not.
        signed: with a sign also above 0; None signs delta_p and delta_m.
    """
    if signed is None:
        signed = name.startswith("delta_")
    sign = "+" if signed else ""
    decimals = DECIMALS.get(name.rpartition("/")[2])
    return f"{value:{sign}.4g}" if decimals is None else f"{value:{sign}.{decimals}f}"


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: columns of equal width, right-aligned, under a ruled heading."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in [headings, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; "|" in a text is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines
    )


def latex(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A `tabular` for the LaTeX package booktabs.

    Args:
        headings, rows: already LaTeX; plain texts go through `escape_latex` first.
    """
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
            r"\toprule",
            " & ".join(headings) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


_LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
