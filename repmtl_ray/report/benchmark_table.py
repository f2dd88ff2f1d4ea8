"""A benchmark's table as text, Markdown, LaTeX and CSV.

Owns how a cell reads: mean ± deviation over seeds, best and second marked among the methods, the
published value and the difference to it beside. The numbers are `records.Summary`'s.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from repmtl_ray.delta import directions
from repmtl_ray.report.records import SINGLE_TASK, SUMMARIES, Row, Summary, Value

HEADINGS = {
    "delta_p_task": "delta_p %",
    "delta_p_metric": "delta_p (metrics) %",
    "delta_m": "delta_m %",
    "mean_rank": "mean rank",
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
LOWER_IS_BETTER = {"delta_m", "mean_rank"}
FOUR_DIGITS = {"abs_error", "rel_error"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number as people read it.

    Args:
        text: mean and deviation.
        beside: published value and difference, or nothing.
        place: 1 for the best of its column, 2 for the second, else 0.
    """

    text: str
    beside: str = ""
    place: int = 0


def heading(name: str) -> str:
    """A column's heading: "depth abs. err." for "depth/abs_error"."""
    task, _, last = name.rpartition("/")
    return f"{task} {HEADINGS.get(last, last)}" if task else HEADINGS.get(name, name)


def lower_is_better(name: str, metrics: Sequence[str]) -> bool:
    if name in SUMMARIES:
        return name in LOWER_IS_BETTER
    return not directions(dict.fromkeys(metrics, 0.0))[name]


def columns(summary: Summary) -> list[str]:
    """Names of the value columns, in order."""
    return [*summary.metrics, *SUMMARIES]


def cells(summary: Summary) -> list[dict[str, Cell]]:
    """By row, then by column."""
    places = {name: _places(summary, name) for name in columns(summary)}
    return [
        {
            name: Cell(
                text=text_of(name, row.values[name], row) if name in row.values else "",
                beside=_beside(name, row.values.get(name)),
                place=places[name].get(row.method, 0),
            )
            for name in columns(summary)
        }
        for row in summary.rows
    ]


def _places(summary: Summary, name: str) -> dict[str, int]:
    """Best and second of a column among the methods; equal means share a place, and none is marked
    where all are equal or there is but one."""
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


def text_of(name: str, value: Value, row: Row) -> str:
    """A mean with its deviation; "± n/a" where one seed has none."""
    signed = name.startswith("delta")
    form = f"{{:{'+' if signed else ''}.{_digits(name)}f}}"
    mean = form.format(value.mean)
    if name == "mean_rank" or not row.seeds or (row.method == SINGLE_TASK and signed):
        return mean
    if value.deviation is None:
        return f"{mean} ± n/a"
    return f"{mean} ± {value.deviation:.{_digits(name)}f}"


def _digits(name: str) -> int:
    return 4 if name.rpartition("/")[2] in FOUR_DIGITS else 2


def _beside(name: str, value: Value | None) -> str:
    if value is None or value.published is None:
        return ""
    digits = _digits(name)
    return f"{value.published:.{digits}f}, {value.mean - value.published:+.{digits}f}"


def title(summary: Summary) -> str:
    return f"{summary.source}; protocol {summary.protocol}, {summary.reported_split} split"


def notes(summary: Summary) -> list[str]:
    """What a reader must know of the rows, a sentence each."""
    found = [
        "Mean ± sample standard deviation over seeds; n/a: one seed has none.",
        "delta_p and delta_m are against the single-task mean, of which "
        + (
            f"the published row stands in ({_published_source()})."
            if summary.baseline == "published"
            else "each task was trained alone with the same protocol."
        ),
        "Best and second of the methods are marked; mean rank is among them, over all metrics.",
    ]
    seeds = {row.method: row.seeds for row in summary.rows if row.seeds}
    if len(set(seeds.values())) == 1:
        found.append(f"Seeds {', '.join(map(str, next(iter(seeds.values()))))}.")
    else:
        found += [f"{method}: seeds {', '.join(map(str, own))}." for method, own in seeds.items()]
    if any(value.published is not None for row in summary.rows for value in row.values.values()):
        found.append(
            f"In brackets: the published mean, and ours less that ({_published_source()})."
        )
    if summary.changes:
        found.append(
            f"Not the protocol's settings: {summary.changes}. Not comparable with published numbers."
        )
    found += summary.notes
    commits = sorted({commit for row in summary.rows for commit in row.commits})
    found.append(f"Code: {', '.join(commits)}.")
    found += [f"Failed: {run}: {reason}" for run, reason in summary.failures.items()]
    return found


def _published_source() -> str:
    return "arXiv:2507.21049, tables 1, 2, 3 and 5"


def terminal(summary: Summary) -> str:
    """Aligned columns; * is best, + second."""
    marks = {0: " ", 1: "*", 2: "+"}
    body = _body(summary, lambda cell: _join(cell.text, cell.beside) + marks[cell.place])
    rows = [_headings(summary, " "), *body]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title(summary), "", lines[0], rule, *lines[1:], "", *notes(summary)])


def markdown(summary: Summary) -> str:
    """Best in bold, second underlined."""
    forms = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    body = _body(summary, lambda cell: _join(forms[cell.place].format(cell.text), cell.beside))
    head = _headings(summary, "")
    rows = [head, ["---"] * len(head), *body]
    table = "\n".join("| " + " | ".join(_md(cell) for cell in row) + " |" for row in rows)
    return "\n".join([title(summary), "", table, "", *(f"- {note}" for note in notes(summary)), ""])


def latex(summary: Summary) -> str:
    """A `tabular` for booktabs; best in bold, second underlined."""
    forms = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}

    def form(cell: Cell) -> str:
        own = forms[cell.place].format(_tex(cell.text))
        return own + (f" {{\\scriptsize({_tex(cell.beside)})}}" if cell.beside else "")

    head = [_tex(text) for text in _headings(summary, "")]
    body = [[_tex(row[0]), *row[1:]] for row in _body(summary, form)]
    lines = [
        f"% {title(summary)}",
        *(f"% {note}" for note in notes(summary)),
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(summary: Summary) -> str:
    """One row a method; for every column its mean, `_sd`, `_published` and `_difference`."""
    names = columns(summary)
    shown = [
        name for name in names if any(_published(row, name) is not None for row in summary.rows)
    ]
    head = ["method", "seeds", "num_seeds"]
    for name in names:
        head += [name, f"{name}_sd"]
        head += [f"{name}_published", f"{name}_difference"] if name in shown else []
    head += ["protocol", "split", "source", "changes", "baseline", "digests", "commits"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in summary.rows:
        line: list[object] = [row.method, " ".join(map(str, row.seeds)), len(row.seeds)]
        for name in names:
            value = row.values.get(name)
            line += ["", ""] if value is None else [value.mean, _or_empty(value.deviation)]
            if name in shown:
                beside = _published(row, name)
                line += ["", ""]
                if value is not None and beside is not None:
                    line[-2:] = [beside, value.mean - beside]
        line += [summary.protocol, summary.reported_split, summary.source, summary.changes]
        writer.writerow([*line, summary.baseline, " ".join(row.digests), " ".join(row.commits)])
    return out.getvalue()


def _published(row: Row, name: str) -> float | None:
    return row.values[name].published if name in row.values else None


def _or_empty(number: float | None) -> object:
    return "" if number is None else number


def _headings(summary: Summary, pad: str) -> list[str]:
    return ["method", *(heading(name) + pad for name in columns(summary))]


def _body(summary: Summary, form: Callable[[Cell], str]) -> list[list[str]]:
    return [
        [_name(row), *(form(cell) for cell in by_column.values())]
        for row, by_column in zip(summary.rows, cells(summary), strict=True)
    ]


def _name(row: Row) -> str:
    if row.method != SINGLE_TASK:
        return row.method
    return "single-task" if row.seeds else "single-task (published)"


def _join(text: str, beside: str) -> str:
    return f"{text} [{beside}]" if beside else text


def _md(text: str) -> str:
    return text.replace("|", r"\|")


_TEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
