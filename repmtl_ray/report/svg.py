"""A few charts as SVG text: lines, dots, scatter with a front, heat map, parallel coordinates.

Owns geometry and marks; colours are classes and variables of the page's style sheet (`page.css`).
Every text from data is escaped here. Sizes are in the units of the view box, 440 wide, so that text
stays readable on a phone. No script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 300
NUM_COLORS = 10
MOST_CELLS = 10
"""Values an axis up to which a heat map has cells."""


@dataclass(frozen=True)
class Line:
    """One curve: its colour's number, what it is called, and its points (x, y)."""

    color: int
    title: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """One point: its colour's number, what it is called, where it is, and whether it stands out."""

    color: int
    title: str
    x: float
    y: float
    marked: bool = False


@dataclass(frozen=True)
class _Frame:
    """The plot area and the two scales."""

    xs: tuple[float, float]
    ys: tuple[float, float]
    left: float = 52
    right: float = 430
    top: float = 12
    bottom: float = 258

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.ys
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two values, at most so many."""
    step = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    while (high - low) / step > most:
        step *= 2 if f"{step:e}"[0] in "15" else 2.5
    first = math.ceil(low / step - 1e-9)
    return [(first + n) * step for n in range(int((high - first * step) / step + 1e-9) + 1)]


def lines(curves: Sequence[Line], *, x: str, y: str) -> str:
    """Curves over epochs."""
    found = [point for curve in curves for point in curve.points if _finite(*point)]
    if not found:
        return _empty("no epoch was reported")
    frame = _Frame(_range([p[0] for p in found], 0), _range([p[1] for p in found]))
    parts = [_axes(frame, x, y)]
    for curve in curves:
        points = [point for point in curve.points if _finite(*point)]
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in points)
        title = f"<title>{escape(curve.title)}</title>"
        if len(points) == 1:
            (only,) = points
            parts.append(
                f'<circle class="fill c{curve.color % NUM_COLORS}" cx="{frame.x(only[0]):.1f}" '
                f'cy="{frame.y(only[1]):.1f}" r="3">{title}</circle>'
            )
        elif points:
            parts.append(
                f'<polyline class="curve c{curve.color % NUM_COLORS}" points="{path}">{title}'
                "</polyline>"
            )
    return _svg(parts, label=f"{y} over {x}")


def scatter(dots: Sequence[Dot], *, x: str, y: str, origin: str = "", front: bool = False) -> str:
    """Points; a cross at (0, 0) if it is named, and a line through the marked ones.

    Args:
        dots: in any order.
        x, y: names of the axes.
        origin: what stands at (0, 0).
        front: join the marked points, from left to right.
    """
    shown = [dot for dot in dots if _finite(dot.x, dot.y)]
    if not shown:
        return _empty("no finished run")
    zero = [0.0] if origin else []
    frame = _Frame(_range([d.x for d in shown] + zero), _range([d.y for d in shown] + zero))
    parts = [_axes(frame, x, y)]
    if origin:
        a, b = frame.x(0), frame.y(0)
        parts.append(
            f'<path class="zero" d="M{frame.left},{b:.1f}H{frame.right}M{a:.1f},{frame.top}V'
            f'{frame.bottom}"/><text class="tick" x="{min(a + 4, 358):.1f}" y="{b - 4:.1f}">'
            f"{escape(origin)}</text>"
        )
    if front:
        best = sorted((d.x, d.y) for d in shown if d.marked)
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in best)
        parts.append(f'<polyline class="front" points="{path}"/>')
    for dot in sorted(shown, key=lambda dot: dot.marked):
        parts.append(
            f'<circle class="dot{" marked" if dot.marked else ""} c{dot.color % NUM_COLORS}" '
            f'cx="{frame.x(dot.x):.1f}" cy="{frame.y(dot.y):.1f}" r="5">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    return _svg(parts, label=f"{y} against {x}")


def strips(rows: Sequence[tuple[str, int, Sequence[float]]], *, x: str) -> str:
    """A row a method, a dot a run, a bar at their mean; a line at zero.

    Args:
        rows: name, colour's number, values.
        x: name of the axis.
    """
    values = [value for _, _, own in rows for value in own if _finite(value)]
    if not values:
        return _empty("no finished run")
    height = 22 * len(rows) + 46
    frame = _Frame(_range([*values, 0.0]), (0, 1), left=128, bottom=height - 40)
    parts = [_x_axis(frame, x)]
    zero = frame.x(0)
    parts.append(f'<path class="zero" d="M{zero:.1f},{frame.top}V{frame.bottom}"/>')
    for place, (name, color, own) in enumerate(rows):
        at = frame.top + 11 + 22 * place
        shown = [value for value in own if _finite(value)]
        parts.append(
            f'<text class="name" x="{frame.left - 8}" y="{at + 4}">{escape(_short(name, 18))}'
            f"<title>{escape(name)}</title></text>"
        )
        if shown:
            mean = frame.x(sum(shown) / len(shown))
            parts.append(
                f'<path class="mean c{color % NUM_COLORS}" d="M{mean:.1f},{at - 8}V{at + 8}"/>'
            )
        parts += [
            f'<circle class="dot c{color % NUM_COLORS}" cx="{frame.x(value):.1f}" cy="{at}" r="4">'
            f"<title>{escape(name)}: {value:+.2f}</title></circle>"
            for value in shown
        ]
    return _svg(parts, label=x, height=height)


def heat_map(
    values: Mapping[tuple[float, float], tuple[float, str]], *, x: str, y: str, unit: str
) -> str:
    """A grid of numbers, red below zero, blue above.

    Args:
        values: by (x, y): the number, and what the cell says when it is pointed at.
        x, y: names of the axes.
        unit: of the numbers.
    """
    if not values:
        return _empty("no finished run")
    xs, ys = sorted({at[0] for at in values}), sorted({at[1] for at in values})
    if max(len(xs), len(ys)) > MOST_CELLS:
        return _heat_dots(values, x=x, y=f"{y} (colour: {unit})")
    left, top, right, bottom = 52, 12, 430, 258
    wide, high = (right - left) / len(xs), (bottom - top) / len(ys)
    limit = max(abs(number) for number, _ in values.values()) or 1.0
    parts = []
    for (a, b), (number, title) in values.items():
        column, row = xs.index(a), len(ys) - 1 - ys.index(b)
        side, strength = _heat(number, limit)
        at = f'x="{left + column * wide:.1f}" y="{top + row * high:.1f}"'
        parts.append(
            f'<rect class="cell {side}" style="--share:{strength}%" {at} width="{wide - 1:.1f}" '
            f'height="{high - 1:.1f}"><title>{escape(title)}</title></rect>'
        )
        parts.append(
            f'<text class="inside{" strong" if strength > 55 else ""}" '
            f'x="{left + (column + 0.5) * wide:.1f}" y="{top + (row + 0.5) * high + 4:.1f}">'
            f"{number:+.1f}</text>"
        )
    parts += [
        f'<text class="tick middle" x="{left + (n + 0.5) * wide:.1f}" y="{bottom + 15}">{a:g}</text>'
        for n, a in enumerate(xs)
    ]
    parts += [
        f'<text class="tick end" x="{left - 6}" y="{bottom - (n + 0.5) * high + 4:.1f}">{b:g}</text>'
        for n, b in enumerate(ys)
    ]
    parts += _names(x, f"{y} (cells: {unit})")
    return _svg(parts, label=f"{unit} over {x} and {y}")


def _heat(number: float, limit: float) -> tuple[str, int]:
    """The class of a colour and its share in percent."""
    return "good" if number >= 0 else "bad", round(abs(number) / limit * 100)


def _heat_dots(values: Mapping[tuple[float, float], tuple[float, str]], *, x: str, y: str) -> str:
    """A dot at each place, for searches that hardly visit one twice."""
    frame = _Frame(_range([at[0] for at in values]), _range([at[1] for at in values]))
    limit = max(abs(number) for number, _ in values.values()) or 1.0
    parts = [_axes(frame, x, y)]
    for (a, b), (number, title) in values.items():
        side, strength = _heat(number, limit)
        parts.append(
            f'<circle class="cell spot {side}" style="--share:{strength}%" cx="{frame.x(a):.1f}" '
            f'cy="{frame.y(b):.1f}" r="7"><title>{escape(title)}</title></circle>'
        )
    return _svg(parts, label=f"{x}, {y}")


def parallel(
    axes: Sequence[str],
    rows: Sequence[tuple[str, int, Sequence[float | str | None]]],
    lower_is_better: Sequence[bool],
) -> str:
    """Parallel coordinates: a line a row, broken where it has no value; better is up.

    Args:
        axes: their names.
        rows: name, colour's number, a number or a word for each axis.
        lower_is_better: by axis; such an axis is upside down.
    """
    if not rows or not axes:
        return _empty("no finished run")
    width = max(560, 96 * len(axes))
    top, bottom = 56, 262
    step = (width - 170) / max(1, len(axes) - 1)
    places = [100 + step * n for n in range(len(axes))]
    heights: list[Mapping[float | str, float]] = []
    parts = []
    for n, name in enumerate(axes):
        own = [row[2][n] for row in rows]
        heights.append(_axis_heights(own, lower_is_better[n], top, bottom))
        parts.append(f'<path class="axis" d="M{places[n]:.1f},{top}V{bottom}"/>')
        stagger = 14 if n % 2 == 0 else 30
        parts.append(
            f'<text class="label middle" x="{places[n]:.1f}" y="{stagger}">{escape(name)}</text>'
        )
        words = any(isinstance(value, str) for value in own)
        by_height = sorted((height, str(value)) for value, height in heights[n].items())
        for height, text in (
            by_height if words or len(by_height) < 3 else by_height[:: len(by_height) - 1]
        ):
            at = f'x="{places[n] - 6:.1f}" y="{height + 4:.1f}"'
            if not words:
                text = f"{float(text):.4g}"
                down = 14 if height >= bottom - 1 else -4
                at = f'x="{places[n]:.1f}" y="{height + down:.1f}"'
            side = "end" if words else "middle"
            parts.append(f'<text class="tick {side}" {at}>{escape(_short(text, 14))}</text>')
    for name, color, values in rows:
        pieces: list[list[str]] = [[]]
        for n, value in enumerate(values):
            if value is None or value not in heights[n]:
                pieces.append([])
            else:
                pieces[-1].append(f"{places[n]:.1f},{heights[n][value]:.1f}")
        title = f"<title>{escape(name)}</title>"
        parts += [
            f'<polyline class="curve c{color % NUM_COLORS}" points="{" ".join(piece)}">{title}'
            "</polyline>"
            for piece in pieces
            if len(piece) > 1
        ]
    return _svg(parts, label="parallel coordinates", width=width)


def _axis_heights(
    values: Sequence[float | str | None], upside_down: bool, top: float, bottom: float
) -> dict[float | str, float]:
    known = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in known):
        words = sorted({str(value) for value in known})
        span = max(1, len(words) - 1)
        return {word: bottom - n / span * (bottom - top) for n, word in enumerate(words)}
    numbers = [float(value) for value in known if _finite(float(value))]
    if not numbers:
        return {}
    low, high = min(numbers), max(numbers)
    found: dict[float | str, float] = {}
    for number in numbers:
        share = 0.5 if high == low else (number - low) / (high - low)
        found[number] = bottom - (1 - share if upside_down else share) * (bottom - top)
    return found


def _range(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * margin if high > low else max(abs(high), 1.0) * (margin or 0.5)
    return low - room, high + room


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _axes(frame: _Frame, x: str, y: str) -> str:
    parts = []
    for value in ticks(*frame.ys):
        at = frame.y(value)
        parts.append(
            f'<path class="grid" d="M{frame.left},{at:.1f}H{frame.right}"/>'
            f'<text class="tick end" x="{frame.left - 6}" y="{at + 4:.1f}">{value:.6g}</text>'
        )
    for value in ticks(*frame.xs):
        parts.append(
            f'<text class="tick middle" x="{frame.x(value):.1f}" y="{frame.bottom + 15}">'
            f"{value:.6g}</text>"
        )
    parts.append(f'<path class="axis" d="M{frame.left},{frame.bottom}H{frame.right}"/>')
    return "".join([*parts, *_names(x, y)])


def _x_axis(frame: _Frame, x: str) -> str:
    parts = []
    for value in ticks(*frame.xs):
        at = frame.x(value)
        parts.append(
            f'<path class="grid" d="M{at:.1f},{frame.top}V{frame.bottom}"/>'
            f'<text class="tick middle" x="{at:.1f}" y="{frame.bottom + 15}">{value:.6g}</text>'
        )
    parts.append(f'<text class="label middle" x="279" y="{frame.bottom + 33}">{escape(x)}</text>')
    return "".join(parts)


def _names(x: str, y: str) -> list[str]:
    return [
        f'<text class="label middle" x="241" y="293">{escape(x)}</text>',
        f'<text class="label middle" transform="rotate(-90)" x="-135" y="12">{escape(y)}</text>',
    ]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _empty(reason: str) -> str:
    return f'<p class="empty">{escape(reason)}</p>'


def _svg(parts: Sequence[str], *, label: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{round(1.4 * width)}px" role="img" '
        f'aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
