"""What Rep-MTL's penalties do to a small run: the tables behind docs/methods.md.

    repmtl-ray diagnose                   rendered streets from scratch, one seed
    repmtl-ray diagnose rooms             pretrained, three tasks

Trains EW-log, Rep-MTL as printed, each penalty alone, the penalty to the encoder alone, and the bounded
penalty, and prints how large the penalty's gradient is beside the tasks' (gradient_share), what TSR is
made of (dominance minus specialisation), how far equation 4 is from chance (channel_mean; 1 is chance)
and what CSA does to the tasks' affinities (alignment, effective_rank). Takes about ten minutes on one
core. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse

from repmtl_ray.cli.commands.study import train_and_print
from repmtl_ray.cli.options import add_set_option


def add_options(parser: argparse.ArgumentParser) -> None:
    """The setting and how many seeds."""
    parser.add_argument("setting", nargs="?", choices=("streets", "rooms"), default="streets")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: %(default)s)")
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")
    add_set_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains what is missing, and prints the tables."""
    from repmtl_ray.studies import rep_mtl

    tables = (rep_mtl.diagnosis_table, rep_mtl.comparison_table)
    experiment = rep_mtl.setting(arguments.setting)
    name = f"diagnose_{arguments.setting}"
    train_and_print(experiment, rep_mtl.DIAGNOSED, tables, arguments, name)
