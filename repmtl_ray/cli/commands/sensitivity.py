"""How Rep-MTL depends on lambda_tsr, lambda_csa (figure 7) and the learning rate (figure 9).

    repmtl-ray sensitivity scenes                          all three, the paper's values
    repmtl-ray sensitivity cityscapes --data DIR --vary csa --gpus-per-worker 1
    repmtl-ray sensitivity scenes --vary tsr --values 0.1 0.9 1.9

One value varies, and the others keep their values (0.9, 0.9, the protocol's learning rate). Options and
results are those of `benchmark`. The single-task rows are trained once, with the protocol's
learning rate.
"""

from __future__ import annotations

import argparse

from repmtl_ray.cli import comparison
from repmtl_ray.studies.methods import Changes, sensitivity

STUDIES = ("tsr", "csa", "rate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every comparison, and what varies."""
    comparison.add_comparison_options(parser)
    parser.add_argument(
        "--vary", nargs="+", choices=STUDIES, default=list(STUDIES), help="default: all three"
    )
    parser.add_argument(
        "--values", nargs="+", type=float, metavar="X", help="for one study (default: the paper's)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains the cells of every study that was named."""
    if arguments.values is not None and len(arguments.vary) != 1:
        raise ValueError("--values needs one study; name it with --vary.")
    cells: dict[str, Changes] = {}
    for which in arguments.vary:
        cells |= sensitivity(which, arguments.values)
    comparison.run(arguments, cells, stem="sensitivity")
