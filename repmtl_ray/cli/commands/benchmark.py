"""Compares methods over seeds by one published protocol; the paper's tables 1, 2, 3 and 5.

    repmtl-ray benchmark scenes                                  rendered street scenes
    repmtl-ray benchmark cityscapes --data DIR --gpus-per-worker 1
    repmtl-ray benchmark office_31 --data DIR --methods EW EW-log Nash-MTL Rep-MTL
    repmtl-ray benchmark scenes --resume NAME                    continues; same other options

A method is a policy on plain losses ("UW"), a policy on log losses ("UW-log"), "Rep-MTL", or a policy
with Rep-MTL's penalties ("Rep-MTL+UW"), or "scalarisation": constant weights, the best of
--scalarisation-samples draws on a holdout of the training samples. The single-task rows are trained first and kept for the next
benchmark. Writes the table as CSV, Markdown and LaTeX, and report.html. Where the data are those of the
paper, the published values stand beside ours. In the first form a run takes 35 to 55 s, two at a time,
on 2 cores. There is one run per method and seed, and one per task and seed.
"""

from __future__ import annotations

import argparse

from repmtl_ray.cli import comparison
from repmtl_ray.cli.options import study_options
from repmtl_ray.studies.methods import Changes, methods

SCALARISATION = "scalarisation"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every comparison, and the methods."""
    comparison.add_comparison_options(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(comparison.METHODS),
        metavar="METHOD",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--scalarisation-samples",
        type=int,
        default=8,
        metavar="N",
        help="weights that the method scalarisation tries on the holdout (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains every method with every seed, and writes the tables."""
    names = [name for name in arguments.methods if name != SCALARISATION]
    cells = methods(names)
    if SCALARISATION in arguments.methods:
        cells[SCALARISATION] = _tuned_weights(arguments)
    result, _ = comparison.run(arguments, cells, stem="benchmark")
    print(
        f"all runs   {result.directory}; continue with --resume {result.directory.split('/')[-1]}"
    )


def _tuned_weights(arguments: argparse.Namespace) -> Changes:
    from repmtl_ray.studies import scalarisation

    if arguments.scalarisation_samples < 1:
        raise ValueError(
            f"--scalarisation-samples is {arguments.scalarisation_samples}; expected at least 1."
        )
    options = study_options(arguments)
    shared = ("placement", "max_concurrent", "storage", "checkpoints")  # --log is of the rows
    return scalarisation.tuned(
        comparison.experiment_of(arguments),
        arguments.scalarisation_samples,
        **{name: options[name] for name in shared},
    )
