"""Time per epoch of methods as a ratio to EW (the paper's figure 8).

    python pipelines/timing.py scenes
    python pipelines/timing.py cityscapes --data DIR --protocol libmtl --device cuda
    python pipelines/timing.py scenes --methods all --rounds 1

Trains in this process, without Ray and without evaluation. The methods take turns, so that other work
of the machine affects all of them; use it on an idle machine. The methods are those of
pipelines/benchmark.py; "all" means every policy on plain losses. Prints the table and writes
timing.csv.
"""

from __future__ import annotations

import csv
from statistics import median

from repmtl_ray import cli, policies
from repmtl_ray.cli import benchmark as cli_benchmark
from repmtl_ray.cli import results as cli_results
from repmtl_ray.cli.options import new_parser
from repmtl_ray.studies.methods import methods
from repmtl_ray.studies.timing import time_methods, timing_table

NEEDS_MORE = ("stl", "Constant", "COSMOS", "PIVRG", "TrimmedMean", "Krum", "IGBv2")
"""Policies that need arguments, other tasks or long warm-ups; not part of "all"."""


def main() -> None:
    parser = new_parser(__doc__)
    cli_benchmark.data_options(parser)
    parser.add_argument(
        "--methods", nargs="+", default=list(cli_benchmark.METHODS), metavar="METHOD"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    names = list(arguments.methods)
    if names == ["all"]:
        names = [name for name in policies.names() if name not in NEEDS_MORE] + ["Rep-MTL"]
    experiment = cli_benchmark.experiment_of(arguments)
    out = cli.folder(arguments.out)
    timings = time_methods(
        experiment,
        methods(names),
        rounds=arguments.rounds,
        device=cli_results.device(arguments.device),
    )
    print(timing_table(timings))
    with (out / "timing.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "median_s", "fastest_s", "slowest_s", "ratio_to_ew", "error"])
        for timing in timings:
            values = [f(timing.seconds) for f in (median, min, max)] if timing.seconds else [""] * 3
            ratio = "" if timing.ratio is None else timing.ratio
            writer.writerow([timing.method, *values, ratio, timing.error])
    print(f"table      {out / 'timing.csv'}")


if __name__ == "__main__":
    cli.main(main)
