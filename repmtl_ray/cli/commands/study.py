"""Is the direction of Rep-MTL's penalties worth anything? EW-log against Rep-MTL and two controls.

    repmtl-ray study streets                       from scratch, 2 tasks, rendered
    repmtl-ray study rooms                         pretrained, 3 tasks, rendered
    repmtl-ray study office --data DIR             pretrained, photographs
    repmtl-ray study rooms --data DIR --paper      the paper's size, on a GPU

Variants: EW-log; Rep-MTL as printed; its penalty bounded to a tenth of the tasks' gradient, for the
encoder alone (share); a random direction of that length; the opposite direction (flipped). If the
random one does as well, the penalty's direction is worth nothing. Metrics are means over the last 3
epochs; delta_p is against the mean of EW-log and paired by seed. Stop the study whenever you like: the
same command goes on. The runs train one after the other, in this process and without Ray.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli.options import add_set_option, assignments
from repmtl_ray.config import replace

SETTINGS = ("streets", "rooms", "office")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The setting, its data, and how many seeds."""
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", metavar="DIR", help="the data set's folder (default: rendered)")
    parser.add_argument("--paper", action="store_true", help="the paper's encoder, size and epochs")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: %(default)s)")
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")
    add_set_option(parser)


def run(arguments: argparse.Namespace) -> None:
    """Trains what is missing, and prints both tables."""
    from repmtl_ray.studies import rep_mtl

    if arguments.seeds < 1:
        raise ValueError(f"--seeds is {arguments.seeds}; expected at least 1.")
    experiment = rep_mtl.setting(arguments.setting, arguments.data, full_size=arguments.paper)
    experiment = replace(experiment, assignments(arguments.set))
    name = f"study_{arguments.setting}{'_paper' if arguments.paper else ''}"
    file = cli.folder(arguments.out) / f"{name}.jsonl"
    rows = rep_mtl.printed_rows(
        experiment, rep_mtl.VARIANTS, range(arguments.seeds), file, arguments.device
    )
    tables = (rep_mtl.comparison_table(rows), rep_mtl.diagnosis_table(rows))
    text = "\n\n".join(rep_mtl.as_markdown(table) for table in tables)
    Path(file).with_suffix(".md").write_text(f"{text}\n")
    print(f"\n{text}\n\nruns       {file}\ntables     {file.with_suffix('.md')}")
