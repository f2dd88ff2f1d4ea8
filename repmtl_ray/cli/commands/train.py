"""Trains one experiment from its file, for example the best of a search.

    repmtl-ray train results/best.json
    repmtl-ray train results/best.json --workers 2 --set epochs=50 --set regularizer.lambda_tsr=0.9

Prints the metrics of every epoch and the path of the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli.options import (
    add_placement_options,
    add_set_option,
    assignments,
    checkpoints_of,
    placement_of,
)
from repmtl_ray.config import replace


def add_options(parser: argparse.ArgumentParser) -> None:
    """The experiment, what is changed in it, and where it runs."""
    parser.add_argument("experiment", type=Path, help="JSON file as a search leaves it (best.json)")
    add_set_option(parser)
    where = add_placement_options(parser, "run")
    where.add_argument("--name", help="of the run; the name of an interrupted run continues it")


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints every epoch's metrics."""
    from repmtl_ray.train import fit

    experiment = cli.read_experiment(arguments.experiment)
    result = fit(
        replace(experiment, assignments(arguments.set)),
        placement=placement_of(arguments),
        storage=arguments.storage,
        name=arguments.name,
        checkpoints=checkpoints_of(arguments),
    )
    for metrics in result.history:
        shown = {
            name: value
            for name, value in metrics.items()
            if "/" in name and not name.startswith("policy/")
        }
        print(
            f"epoch {metrics['epoch']:g}  "
            + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        )
    print(f"checkpoint {result.checkpoint}")
