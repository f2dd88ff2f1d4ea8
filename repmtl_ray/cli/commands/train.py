"""Trains one experiment from its file, for example the best of a search.

    repmtl-ray train results/best.json
    repmtl-ray train results/best.json --workers 2 --set epochs=50 --set regularizer.lambda_tsr=0.9
    repmtl-ray train --data faces/labels.csv --set epochs=20     a table of photographs and labels
    repmtl-ray train --data PACS --domains photo sketch          folders <domain>/<class>

Prints a line for every epoch, with the time that is left, and the path of the last checkpoint; in a
terminal it shows a bar. `--log tensorboard` also writes the numbers of steps and epochs where
TensorBoard finds them (also csv, mlflow and wandb; pip install "repmtl_ray[loggers]"). With --data the
experiment is the protocol libmtl: a pretrained ResNet-18, EW, 100 epochs; --set changes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import cli, protocols
from repmtl_ray.cli.options import (
    add_log_options,
    add_placement_options,
    add_set_option,
    assignments,
    checkpoints_of,
    log_of,
    placement_of,
)
from repmtl_ray.config import DataConfig, Experiment, replace


def add_options(parser: argparse.ArgumentParser) -> None:
    """The experiment, what is changed in it, and where it runs."""
    parser.add_argument(
        "experiment", type=Path, nargs="?", help="JSON file as a search leaves it (best.json)"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="instead of an experiment: a CSV or Parquet file with the paths of photographs (column "
        "image) and a column of labels for each task, or a folder of domains",
    )
    parser.add_argument(
        "--domains", nargs="+", metavar="DOMAIN", help="of a folder; each is a task"
    )
    add_set_option(parser)
    where = add_placement_options(parser, "run")
    add_log_options(where)
    where.add_argument("--name", help="of the run; the name of an interrupted run continues it")


def experiment_of(arguments: argparse.Namespace) -> Experiment:
    """The experiment of the file, or that of the protocol libmtl on the given data.

    Raises:
        ValueError: both or neither, a file that holds no experiment, domains of a table.
    """
    path, domains = arguments.data, arguments.domains
    if (path is None) == (arguments.experiment is None):
        raise ValueError("train needs either the file of an experiment, or --data PATH.")
    if path is None:
        return cli.read_experiment(arguments.experiment)
    name = "image_folders" if Path(path).expanduser().is_dir() else "image_table"
    given = None if domains is None else tuple(domains)
    return protocols.settings("libmtl", DataConfig(name=name, path=path, domains=given))


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints every epoch's metrics."""
    experiment = experiment_of(arguments)
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
