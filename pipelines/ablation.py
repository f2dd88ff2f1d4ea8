"""The paper's table 4 with fair credit: log losses x TSR x CSA, eight cells.

    python pipelines/ablation.py scenes                    rendered street scenes
    python pipelines/ablation.py cityscapes --data DIR --protocol libmtl --gpus-per-worker 1

The paper's "neither" trains on plain losses and its other cells on their logarithms; here the
logarithm is a factor of its own, so that what it gives is not booked on the penalties. Besides the
table it prints, and leaves as factors.csv, what each factor changes delta_p by: over all cells, alone,
and beside the other two; where these differ, the factors depend on each other. Options and results
are those of pipelines/benchmark.py. Cost of the first form: 8 x 3 runs and 6 single-task ones of 35 to
55 s, two at a time, on 2 cores.
"""

from __future__ import annotations

import csv
from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli import benchmark as cli_benchmark
from repmtl_ray.report.records import factor_effects
from repmtl_ray.report.table import aligned
from repmtl_ray.studies.methods import ablation

FACTORS = ("log", "TSR", "CSA")


def main() -> None:
    arguments = cli_benchmark.parser(__doc__).parse_args()
    _, summary = cli_benchmark.run(arguments, ablation(), stem="ablation")
    effects = factor_effects(summary, FACTORS)
    file = Path(arguments.out) / "factors.csv"
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


if __name__ == "__main__":
    cli.main(main)
