"""The table of a benchmark as text, Markdown, LaTeX and CSV.

Owns what a cell says: mean ± deviation over seeds, best and second among the methods, the published
value and the difference to it. The numbers are those of `records.Summary`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repmtl_ray.delta import directions
from repmtl_ray.report import table as tables
from repmtl_ray.report.records import SINGLE_TASK, SUMMARIES, Row, Summary, Value

LOWER_IS_BETTER = {"delta_m", "mean_rank"}
PUBLISHED_SOURCE = "arXiv:2507.21049, tables 1, 2, 3 and 5"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number as people read it.

    Args:
        mean: over seeds.
        deviation: over seeds; "n/a" for one seed, empty where none is shown.
        published: the published value and the difference to it, or empty.
        place: 1 for the best of its column, 2 for the second, else 0.
    """

    mean: str = ""
    deviation: str = ""
    published: str = ""
    place: int = 0

    @property
    def text(self) -> str:
        return f"{self.mean} ± {self.deviation}" if self.deviation else self.mean


def lower_is_better(name: str, metrics: Sequence[str]) -> bool:
    if name in SUMMARIES:
        return name in LOWER_IS_BETTER
    return not directions(dict.fromkeys(metrics, 0.0))[name]


def columns(summary: Summary) -> list[str]:
    """Names of the value columns; delta_p over tasks, which methods are compared by, is the first."""
    return [SUMMARIES[0], *summary.metrics, *SUMMARIES[1:]]


def method_name(row: Row) -> str:
    if row.method != SINGLE_TASK:
        return row.method
    return "single-task" if row.seeds else "single-task (published)"


def cells(summary: Summary) -> list[dict[str, Cell]]:
    """By row, then by column."""
    places = {name: _places(summary, name) for name in columns(summary)}
    return [
        {
            name: _cell(name, row.values[name], row, places[name].get(row.method, 0))
            if name in row.values
            else Cell()
            for name in columns(summary)
        }
        for row in summary.rows
    ]


def _cell(name: str, value: Value, row: Row, place: int) -> Cell:
    is_zero = row.method == SINGLE_TASK and name in SUMMARIES
    deviation = (
        "n/a" if value.deviation is None else tables.number(name, value.deviation, signed=False)
    )
    published = ""
    if value.published is not None:
        difference = tables.number(name, value.mean - value.published, signed=True)
        published = f"{tables.number(name, value.published)}, {difference}"
    return Cell(
        mean=tables.number(name, value.mean),
        deviation="" if name == "mean_rank" or not row.seeds or is_zero else deviation,
        published=published,
        place=place,
    )


def _places(summary: Summary, name: str) -> dict[str, int]:
    """Best and second of a column among the methods; equal means share a place, and none is marked
    if all are equal."""
    means = {
        row.method: row.values[name].mean
        for row in summary.rows
        if row.method != SINGLE_TASK and name in row.values
    }
    ordered = sorted(set(means.values()), reverse=not lower_is_better(name, summary.metrics))
    if len(ordered) < 2:
        return {}
    place_of = {ordered[0]: 1, ordered[1]: 2}
    return {method: place_of[mean] for method, mean in means.items() if mean in place_of}


def title(summary: Summary) -> str:
    return f"{summary.source}; protocol {summary.protocol}, {summary.reported_split} split"


def notes(summary: Summary) -> list[str]:
    """What a reader must know about the rows, one sentence each."""
    baseline = (
        f"the published row stands in ({PUBLISHED_SOURCE})."
        if summary.baseline == "published"
        else "each task was trained alone with the same protocol."
    )
    sentences = [
        "Mean ± sample standard deviation over seeds; n/a: one seed has none.",
        f"delta_p and delta_m are against the single-task mean, of which {baseline}",
        "Best and second of the methods are marked; mean rank is among them, over all metrics.",
    ]
    seeds = {row.method: row.seeds for row in summary.rows if row.seeds}
    if len(set(seeds.values())) == 1:
        sentences.append(f"Seeds {', '.join(map(str, next(iter(seeds.values()))))}.")
    else:
        sentences += [
            f"{method}: seeds {', '.join(map(str, own))}." for method, own in seeds.items()
        ]
    if any(value.published is not None for row in summary.rows for value in row.values.values()):
        sentences.append(
            f"In brackets: the published mean, and ours less that ({PUBLISHED_SOURCE})."
        )
    if summary.changes:
        sentences.append(
            f"Not the protocol's settings: {summary.changes}. Not comparable with published numbers."
        )
    sentences += summary.notes
    commits = sorted({commit for row in summary.rows for commit in row.commits})
    sentences.append(f"Code: {', '.join(commits)}.")
    return sentences + [f"Failed: {run}: {reason}" for run, reason in summary.failures.items()]


def terminal(summary: Summary) -> str:
    """Aligned columns; * marks the best, + the second."""
    marks = {0: " ", 1: "*", 2: "+"}
    names = [f"{heading} " for heading in tables.headings(columns(summary))]
    rows = _rows(summary, lambda cell: _with_published(cell, cell.text) + marks[cell.place])
    text = tables.aligned(["method", *names], rows)
    return "\n".join([title(summary), "", text, "", *notes(summary)])


def markdown(summary: Summary) -> str:
    """The best in bold, the second underlined."""
    forms = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    rows = _rows(summary, lambda cell: _with_published(cell, forms[cell.place].format(cell.text)))
    text = tables.markdown(["method", *tables.headings(columns(summary))], rows)
    return "\n".join([title(summary), "", text, "", *(f"- {note}" for note in notes(summary)), ""])


def latex(summary: Summary) -> str:
    """A `tabular` for booktabs; the best in bold, the second underlined."""
    forms = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}

    def form(cell: Cell) -> str:
        text = forms[cell.place].format(tables.escape_latex(cell.text))
        if not cell.published:
            return text
        return f"{text} {{\\scriptsize({tables.escape_latex(cell.published)})}}"

    names = [tables.escape_latex(name) for name in tables.headings(columns(summary))]
    rows = [[tables.escape_latex(row[0]), *row[1:]] for row in _rows(summary, form)]
    comments = [f"% {line}" for line in (title(summary), *notes(summary))]
    return "\n".join([*comments, tables.latex(["method", *names], rows), ""])


def comma_separated(summary: Summary) -> str:
    """One row per method; for every column its mean, `_sd`, `_published` and `_difference`."""
    names = columns(summary)
    published = [
        name
        for name in names
        if any(
            name in row.values and row.values[name].published is not None for row in summary.rows
        )
    ]
    header = ["method", "seeds", "num_seeds"]
    for name in names:
        header += [name, f"{name}_sd"]
        header += [f"{name}_published", f"{name}_difference"] if name in published else []
    header += ["protocol", "split", "source", "changes", "baseline", "digests", "commits"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in summary.rows:
        line: list[object] = [row.method, " ".join(map(str, row.seeds)), len(row.seeds)]
        for name in names:
            value = row.values.get(name)
            line += ["", ""] if value is None else [value.mean, value.deviation]
            if name in published:
                if value is None or value.published is None:
                    line += ["", ""]
                else:
                    line += [value.published, value.mean - value.published]
        line += [summary.protocol, summary.reported_split, summary.source, summary.changes]
        writer.writerow([*line, summary.baseline, " ".join(row.digests), " ".join(row.commits)])
    return out.getvalue()


def _rows(summary: Summary, form: Callable[[Cell], str]) -> list[list[str]]:
    return [
        [method_name(row), *(form(cell) for cell in by_column.values())]
        for row, by_column in zip(summary.rows, cells(summary), strict=True)
    ]


def _with_published(cell: Cell, text: str) -> str:
    return f"{text} [{cell.published}]" if cell.published else text
