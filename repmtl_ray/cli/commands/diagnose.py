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

from repmtl_ray import cli
from repmtl_ray.cli.options import add_set_option, assignments
from repmtl_ray.config import replace


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

    if arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}; expected at least 1.")
    experiment = replace(rep_mtl.setting(arguments.setting), assignments(arguments.set))
    file = cli.folder(arguments.out) / f"diagnose_{arguments.setting}.jsonl"
    rows = rep_mtl.printed_rows(
        experiment, rep_mtl.DIAGNOSED, range(arguments.seeds), file, arguments.device
    )
    tables = (rep_mtl.diagnosis_table(rows), rep_mtl.comparison_table(rows))
    text = "\n\n".join(rep_mtl.as_markdown(table) for table in tables)
    file.with_suffix(".md").write_text(f"{text}\n")
    print(f"\n{text}\n\nruns       {file}\ntables     {file.with_suffix('.md')}")
