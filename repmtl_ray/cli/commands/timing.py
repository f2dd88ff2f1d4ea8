"""Time per epoch of methods as a ratio to EW (the paper's figure 8).

    repmtl-ray timing scenes
    repmtl-ray timing cityscapes --data DIR --protocol libmtl --device cuda
    repmtl-ray timing scenes --methods all --rounds 1

Trains in this process, without Ray and without evaluation. The methods take turns, so that other work
of the machine affects all of them; use it on an idle machine. The methods are those of `benchmark`;
"all" means every policy on plain losses. Prints the table and writes timing.csv.
"""

from __future__ import annotations

import argparse
import csv
from statistics import median

from repmtl_ray import cli
from repmtl_ray.cli import comparison
from repmtl_ray.studies.methods import methods

NEEDS_MORE = ("stl", "Constant", "COSMOS", "PIVRG", "TrimmedMean", "Krum", "IGBv2")
"""Policies that need arguments, other tasks or long warm-ups; not part of "all"."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The data and training of a comparison, the methods and the device."""
    comparison.add_data_options(parser)
    parser.add_argument("--methods", nargs="+", default=list(comparison.METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Times the methods in turns, and writes the table."""
    from repmtl_ray import policies
    from repmtl_ray.studies.timing import time_methods, timing_table

    names = list(arguments.methods)
    if names == ["all"]:
        names = [name for name in policies.names() if name not in NEEDS_MORE] + ["Rep-MTL"]
    experiment = comparison.experiment_of(arguments)
    out = cli.folder(arguments.out)
    timings = time_methods(
        experiment,
        methods(names),
        rounds=arguments.rounds,
        device=cli.device(arguments.device),
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
