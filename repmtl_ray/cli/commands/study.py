"""Is the direction of Rep-MTL's penalties worth anything? EW-log against Rep-MTL and its controls.

    repmtl-ray study streets                       from scratch, 2 tasks, rendered
    repmtl-ray study rooms                         pretrained, 3 tasks, rendered
    repmtl-ray study office --data DIR             pretrained, photographs
    repmtl-ray study rooms --data DIR --paper      the paper's size, on a GPU

Variants: EW-log; Rep-MTL as printed; its penalty bounded to a tenth of the tasks' gradient, for the
encoder alone (share); a random direction of that length; the opposite direction (flipped); and the
direction of a penalty that heads cannot satisfy (divergence). If the random one does as well, the
penalty's direction is worth nothing. Metrics are means over the last 3 epochs; delta_p is against the
mean of EW-log and paired by seed. Stop the study whenever you like: the same command goes on. The runs
train one after the other, in this process and without Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from repmtl_ray import cli
from repmtl_ray.cli.options import add_set_option, assignments, checked_seeds
from repmtl_ray.config import Experiment, RegularizerConfig, replace

if TYPE_CHECKING:
    from repmtl_ray.studies.rep_mtl import Row

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

    experiment = rep_mtl.setting(arguments.setting, arguments.data, full_size=arguments.paper)
    name = f"study_{arguments.setting}{'_paper' if arguments.paper else ''}"
    tables = (rep_mtl.comparison_table, rep_mtl.diagnosis_table)
    train_and_print(experiment, rep_mtl.VARIANTS, tables, arguments, name)


def train_and_print(
    experiment: Experiment,
    variants: Mapping[str, RegularizerConfig],
    tables: Sequence[Callable[[Sequence[Row]], list[list[str]]]],
    arguments: argparse.Namespace,
    name: str,
) -> None:
    """Trains what is missing of a study; prints its tables and writes them beside its runs.

    Args:
        experiment: what the variants share.
        variants: what each changes, by name.
        tables: what makes a table of the runs.
        arguments: of the command: `seeds`, `device`, `out`, `set`.
        name: of the files in the folder of results.

    Raises:
        ValueError: a number of seeds that is not allowed, a change that is none.
    """
    from repmtl_ray.studies import rep_mtl

    experiment = replace(experiment, assignments(arguments.set))
    seeds = checked_seeds(arguments.seeds)
    file = cli.folder(arguments.out) / f"{name}.jsonl"
    rows = rep_mtl.printed_rows(experiment, variants, seeds, file, arguments.device)
    text = "\n\n".join(rep_mtl.as_markdown(table(rows)) for table in tables)
    file.with_suffix(".md").write_text(f"{text}\n")
    print(f"\n{text}\n\nruns       {file}\ntables     {file.with_suffix('.md')}")
