"""The paper's table 4 with fair credit: log losses x TSR x CSA, eight cells.

    python pipelines/ablation.py scenes                    rendered street scenes
    python pipelines/ablation.py cityscapes --data DIR --protocol libmtl --gpus-per-worker 1

The paper's "neither" trains on plain losses and its other cells on their logarithms; here the
logarithm is a factor of its own, so that what it gives is not booked on the penalties. Besides the
table it prints what each factor is worth: the mean difference of delta_p between the cells that have
it and those that have not. Options and results are those of pipelines/benchmark.py. Cost of the
first form: 8 x 3 runs and 6 single-task ones of about 35 s, two at a time, on 2 cores.
"""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.cli import benchmark as cli_benchmark
from repmtl_ray.report.records import factor_effects
from repmtl_ray.studies.methods import ablation

FACTORS = ("log", "TSR", "CSA")


def main() -> None:
    arguments = cli_benchmark.parser(__doc__).parse_args()
    _, summary = cli_benchmark.run(arguments, ablation(), stem="ablation")
    for factor, effect in factor_effects(summary, FACTORS).items():
        shown = "n/a (a cell is missing)" if effect is None else f"{effect:+.2f} points of delta_p"
        print(f"{factor:<4} {shown}")


if __name__ == "__main__":
    cli.main(main)
