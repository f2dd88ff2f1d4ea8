"""One HTML file that needs nothing else: style, script and pictures are inside.

Owns the page's frame and its elements (tables to sort, charts to choose among, pictures); what they
show is decided in `html_report.py`. Everything that comes from data is escaped here or in `svg.py`.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from repmtl_ray.report.svg import NUM_COLORS

WIDE = 900
"""Pixels above which a picture is not shrunk to a phone's width."""


@dataclass(frozen=True)
class Field:
    """A table cell: what is read, what is sorted by, a line below, and a class."""

    text: str
    value: float | str | None = None
    below: str = ""
    kind: str = ""


def page(title: str, subtitle: str, chips: Sequence[str], sections: Sequence[str]) -> str:
    """The whole document."""
    marks = "".join(f"<li>{escape(chip)}</li>" for chip in chips)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<main>\n<header>\n<h1>{escape(title)}</h1>\n<p class="sub">{escape(subtitle)}</p>\n'
        f'<ul class="chips">{marks}</ul>\n</header>\n'
        + "\n".join(sections)
        + f"\n</main>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("repmtl_ray.report").joinpath(name).read_text(encoding="utf-8")


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def notes(sentences: Sequence[str]) -> str:
    return (
        '<ul class="notes">' + "".join(f"<li>{escape(line)}</li>" for line in sentences) + "</ul>"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[Field]]) -> str:
    """A table whose columns sort on a click; without script it is a table."""
    head = "".join(
        f'<th scope="col"><button type="button">{escape(text)}</button></th>' for text in headings
    )
    body = "".join(f"<tr>{''.join(_field(field) for field in row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _field(field: Field) -> str:
    value = field.text if field.value is None else field.value
    below = f"<small>{escape(field.below)}</small>" if field.below else ""
    kind = f' class="{escape(field.kind)}"' if field.kind else ""
    shown = repr(value) if isinstance(value, float) else str(value)
    return f'<td{kind} data-value="{escape(shown)}">{escape(field.text)}{below}</td>'


def legend(names: Sequence[str]) -> str:
    """The colours, in the order of their numbers."""
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><span class="key c{n % NUM_COLORS}"></span>{escape(name)}</li>'
            for n, name in enumerate(names)
        )
        + "</ul>"
    )


def charts(*figures: str) -> str:
    return '<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def figure(title: str, chart: str, caption: str = "", *, full: bool = False) -> str:
    kind = ' class="full"' if full else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure{kind}><h3>{escape(title)}</h3><div class="scroll">{chart}</div>{below}</figure>'
    )


def chosen(title: str, by_name: Mapping[str, str], caption: str = "", *, full: bool = False) -> str:
    """Charts of which one is shown at a time; without script all are."""
    if len(by_name) == 1:
        ((name, chart),) = by_name.items()
        return figure(f"{title}: {name}", chart, caption, full=full)
    options = "".join(
        f'<option value="{n}">{escape(name)}</option>' for n, name in enumerate(by_name)
    )
    shown = "".join(
        f'<div data-choice="{n}">{chart}</div>' for n, chart in enumerate(by_name.values())
    )
    kind = ' class="full"' if full else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure{kind}><h3>{escape(title)}</h3><select data-shows aria-label="{escape(title)}">'
        f'{options}</select><div class="scroll">{shown}</div>{below}</figure>'
    )


def picture(title: str, png: bytes, caption: str = "") -> str:
    """A PNG; wide ones scroll on a phone rather than shrink."""
    data = base64.b64encode(png).decode()
    width, height = struct.unpack(">II", png[16:24])
    kind = ' class="panel"' if width > WIDE else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="full"><h3>{escape(title)}</h3><div class="scroll">'
        f'<img{kind} alt="{escape(title)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}"></div>{below}'
        "</figure>"
    )


def details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
