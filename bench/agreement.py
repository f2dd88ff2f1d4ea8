"""How the comparisons of every method in docs/results.md agree: which method is above EW where.

    python -m bench.agreement [docs/results.md]

Reads the tables under the headings "Every method on ...". Prints Spearman's rank correlation of the
methods' mean delta_p for every pair of problems, once of all methods and once without those that are
more than 5 points behind EW on one of the two, and the methods that are above EW, or below it, on all
problems. Trains nothing.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from scipy.stats import spearmanr

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
HEADING = "## Every method on "
BASELINE = "EW"
FAILS_BELOW = -5.0
"""Points behind EW from which a method counts as one that fails."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def differences(section: str) -> dict[str, float]:
    """The mean delta_p of every method but EW, relative to EW, of the first table of a section."""
    lines = itertools.dropwhile(lambda line: not line.startswith("| method"), section.splitlines())
    head, _, *rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    column = next(index for index, name in enumerate(cells(head)) if name.startswith("delta_p"))
    found = {cells(row)[0]: cells(row)[column] for row in rows}
    return {name: float(cell.split("±")[0]) for name, cell in found.items() if name != BASELINE}


def comparisons(text: str) -> dict[str, dict[str, float]]:
    """By problem, the differences of its table."""
    sections = (part.partition("\n") for part in text.split(HEADING)[1:])
    return {title: differences(body.partition("\n## ")[0]) for title, _, body in sections}


def agreement(text: str) -> list[str]:
    """Lines of Markdown: the correlations, then the methods of one sign."""
    tables = comparisons(text)
    lines = [
        "| problems | methods | rank correlation | of those that do not fail | rank correlation |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (first, one), (second, other) in itertools.combinations(tables.items(), 2):
        shared = sorted(one.keys() & other.keys())
        working = [name for name in shared if min(one[name], other[name]) >= FAILS_BELOW]
        numbers = [
            f"{len(names)} | {spearmanr([one[n] for n in names], [other[n] for n in names]).statistic:+.2f}"
            for names in (shared, working)
        ]
        lines.append(f"| {first}, {second} | {' | '.join(numbers)} |")
    everywhere = sorted(set.intersection(*(set(table) for table in tables.values())))
    for word, sign in (("above", 1), ("below", -1)):
        same = [
            name for name in everywhere if all(sign * table[name] > 0 for table in tables.values())
        ]
        lines.append(f"\n{word} EW on all, of {len(everywhere)} methods: {', '.join(same)}")
    return lines


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print("\n".join(agreement(file.read_text())))
