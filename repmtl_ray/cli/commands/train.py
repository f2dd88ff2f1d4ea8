"""Trains one experiment from its file, for example the best of a search.

    repmtl-ray train results/best.json
    repmtl-ray train results/best.json --workers 2 --set epochs=50 --set regularizer.lambda_tsr=0.9

Prints a line for every epoch, with the time that is left, and the path of the last checkpoint; in a
terminal it shows a bar. `--log tensorboard` also writes the numbers of steps and epochs where
TensorBoard finds them (also csv, mlflow and wandb; pip install "repmtl_ray[loggers]").
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli.options import (
    add_log_options,
    add_placement_options,
    add_set_option,
    assignments,
    checkpoints_of,
    log_of,
    placement_of,
)
from repmtl_ray.config import replace


def add_options(parser: argparse.ArgumentParser) -> None:
    """The experiment, what is changed in it, and where it runs."""
    parser.add_argument("experiment", type=Path, help="JSON file as a search leaves it (best.json)")
    add_set_option(parser)
    where = add_placement_options(parser, "run")
    add_log_options(where)
    where.add_argument("--name", help="of the run; the name of an interrupted run continues it")


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints every epoch's metrics."""
    experiment = cli.read_experiment(arguments.experiment)
    from repmtl_ray.runs.live import metric_words
    from repmtl_ray.train import fit

    result = fit(
        replace(experiment, assignments(arguments.set)),
        placement=placement_of(arguments),
        storage=arguments.storage,
        name=arguments.name,
        checkpoints=checkpoints_of(arguments),
        progress=True,
        **log_of(arguments),
    )
    if not result.epochs_now:  # it had finished before, so that nothing was printed
        for metrics in result.history:
            print("  ".join([f"epoch {metrics['epoch']:g}", *metric_words(metrics)]))
    print(f"checkpoint {result.checkpoint}")
