"""Which method for this problem? EW, EW-log, tuned weights, UW, FairGrad and a bounded Rep-MTL.

    repmtl-ray recommend scenes --minutes 20
    repmtl-ray recommend office_31 --data DIR --preset small --minutes 120
    repmtl-ray recommend scenes --methods all --rates 0.3 1 3 --draws 3 --seeds 3 --processes 8

Trains the methods within the budget, all of a seed before the next seed, without Ray: in this process,
or in --processes beside each other. Prints each method's paired difference from EW with its deviation
over seeds and its test (alone, and adjusted by Holm for so many comparisons), how the tasks' gradients
conflict, the time of a run as a ratio to EW's, and what may be concluded. "tuned weights" are the best
of --draws constant weights on a held-out fifth of the training samples; with several --rates every
other method chooses its learning rate in the same way. Stop whenever you like: the same command goes
on, and a larger budget adds seeds. A problem of your own code: repmtl_ray.recommend(experiment,
data=..., model=...).
"""

from __future__ import annotations

import argparse

from repmtl_ray import cli
from repmtl_ray.cli import comparison
from repmtl_ray.cli.options import checked_seeds


def add_options(parser: argparse.ArgumentParser) -> None:
    """The problem, the budget and the methods."""
    comparison.add_data_options(parser)
    add = parser.add_argument_group("what is compared").add_argument
    add("--minutes", type=float, default=30.0, help="budget of training (default: %(default)s)")
    add("--seeds", type=int, default=5, metavar="N", help="at most (default: %(default)s)")
    add("--methods", nargs="+", metavar="METHOD", help='names, or "all" (default: six)')
    add("--draws", type=int, default=6, help="candidates of tuned weights (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[1.0], help="factors of the learning rate")
    add("--device", default="cpu", help="for example cuda (default: %(default)s)")
    add("--processes", type=int, default=1, metavar="N", help="that train at once (default: 1)")
    add("--out", default="results", help="folder (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Trains what is missing and fits into the budget, and prints what was found."""
    from repmtl_ray.runs.build import selected_tasks
    from repmtl_ray.studies import recommend

    experiment = comparison.experiment_of(arguments)
    names = list(arguments.methods or recommend.METHODS)
    if names == ["all"]:
        names = recommend.every_method(len(selected_tasks(experiment)))
    found = recommend.recommend(
        experiment,
        minutes=arguments.minutes,
        seeds=checked_seeds(arguments.seeds),
        names=names,
        draws=arguments.draws,
        rates=arguments.rates,
        directory=cli.folder(arguments.out),
        device=str(cli.device(arguments.device)),
        processes=arguments.processes,
    )
    found.file.with_suffix(".md").write_text(f"{found}\n")
    print(f"\n{found}\ntables     {found.file.with_suffix('.md')}")
