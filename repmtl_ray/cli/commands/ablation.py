"""The paper's table 4 with fair credit: log losses x TSR x CSA, eight cells.

    repmtl-ray ablation scenes                    rendered street scenes
    repmtl-ray ablation cityscapes --data DIR --protocol libmtl --gpus-per-worker 1

In the paper, the cell without penalties trains on plain losses and the other cells train on their
logarithms. Here the logarithm is a factor of its own, so that its gain is not counted as the gain of
the penalties. Besides the table, the recipe prints by how much each factor changes delta_p, and writes
it to factors.csv: over all cells, alone, and together with the other two. Where these differ, the
factors depend on each other. Options and results are those of `benchmark`. The first form takes
8 x 3 runs and 6 single-task runs of 35 to 55 s, two at a time, on 2 cores.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

from repmtl_ray.cli import comparison
from repmtl_ray.report.table import aligned
from repmtl_ray.studies.methods import ablation

if TYPE_CHECKING:
    from repmtl_ray.report.records import Summary

FACTORS = ("log", "TSR", "CSA")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every comparison."""
    comparison.add_comparison_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains the cells, and says what each factor is worth."""
    _, summary = comparison.run(arguments, ablation(), stem="ablation")
    write_effects(summary, Path(arguments.out))


def write_effects(summary: Summary, out: Path) -> None:
    """Prints what each factor is worth, and writes it to factors.csv.

    Args:
        summary: of the cells of `methods.ablation`.
        out: a folder.
    """
    from repmtl_ray.report.records import factor_effects

    effects = factor_effects(summary, FACTORS)
    file = out / "factors.csv"
    if effects is None:
        file.unlink(missing_ok=True)  # of an earlier run
        print("points of delta_p by factor: n/a (a cell is missing)")
        return
    header = ["points of delta_p", "on average", "alone", "beside the others"]
    rows = [
        [name, *(f"{value:+.2f}" for value in (effect.average, effect.alone, effect.beside_all))]
        for name, effect in effects.items()
    ]
    print(aligned(header, rows))
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["factor", *header[1:]], *rows])
