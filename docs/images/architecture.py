"""Draws docs/images/architecture.svg: the floors of the package, and four ways through them.

python docs/images/architecture.py
"""

from __future__ import annotations

from pathlib import Path

FLOORS = [
    ("command line", ["cli/commands", "cli/console", "pipelines/ (thin)"]),
    ("studies", ["search/", "studies/benchmark", "report/", "planning/"]),
    ("one run on Ray", ["train", "runs/worker", "search/trial", "prepared_run"]),
    ("one run", ["runs/loop", "runs/step", "runs/checkpoint", "runs/callbacks"]),
    ("methods", ["policies/", "regularizers", "saliency"]),
    ("model and data", ["models/", "tasks", "data/", "scenes/"]),
    ("ground", ["config", "storage", "collectives", "conversion"]),
]
"""From the top; a module imports from its own floor and from those below."""
WAYS = {
    "experiment": ("#c2571a", [(0, 0), (1, 0), (2, 0), (3, 0), (6, 0)]),
    "batch": ("#2a7ab9", [(6, 1), (5, 2), (3, 0), (3, 1)]),
    "gradient": ("#2e8b45", [(5, 0), (4, 2), (4, 1), (4, 0), (3, 1)]),
    "checkpoint": ("#7a4fa3", [(3, 1), (3, 2), (6, 1)]),
}
WIDTH, LEFT, HEIGHT, BOX = 900, 150, 66, 30


def place(floor: int, column: int) -> tuple[float, float]:
    """The middle of a box."""
    columns = len(FLOORS[floor][1])
    step = (WIDTH - LEFT - 20) / columns
    return LEFT + step * (column + 0.5), 74 + HEIGHT * floor


def box(x: float, y: float, text: str, width: float) -> str:
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="5"'
        f' fill="#ffffff" stroke="#555555"/>'
        f'<text x="{x:.0f}" y="{y + 6:.0f}" text-anchor="middle">{text}</text>'
    )


def dot(x: float, y: float, color: str, number: int) -> str:
    """Where a way stops, and as which stop."""
    return (
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="9" fill="{color}"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}" font-size="11" fill="#ffffff" text-anchor="middle">'
        f"{number}</text>"
    )


def main() -> None:
    height = 50 + HEIGHT * len(FLOORS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    lines, dots = [], []
    for index, (name, (color, stops)) in enumerate(WAYS.items()):
        shift = 22 * (index - 1.5)
        points = [(x + shift, y) for x, y in (place(*stop) for stop in stops)]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="3" '
            f'stroke-opacity="0.6"/>'
        )
        dots += [dot(x, y - BOX / 2, color, n) for n, (x, y) in enumerate(points, start=1)]
        x = LEFT + 190 * index
        lines.append(
            f'<line x1="{x}" y1="18" x2="{x + 30}" y2="18" stroke="{color}" stroke-width="3"/>'
        )
        lines.append(f'<text x="{x + 38}" y="23">{name}</text>')
    boxes = []
    for floor, (name, files) in enumerate(FLOORS):
        y = 70 + HEIGHT * floor
        shade = "#f3f3f0" if floor % 2 else "#e9e9e4"
        parts.append(
            f'<rect y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" fill="{shade}"/>'
        )
        parts.append(f'<text x="12" y="{y + 5}" font-weight="bold">{name}</text>')
        boxes += [box(*place(floor, column), file, 132) for column, file in enumerate(files)]
    out = Path(__file__).with_suffix(".svg")
    out.write_text("\n".join([*parts, *lines, *boxes, *dots, "</svg>", ""]))


if __name__ == "__main__":
    main()
