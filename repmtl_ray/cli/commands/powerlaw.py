"""Power-law exponents of a checkpoint's encoder and heads (the paper's figures 3 to 6).

    repmtl-ray powerlaw CHECKPOINT [CHECKPOINT ...]

Uses the library weightwatcher (pip install "repmtl_ray[analysis]"). Shows several checkpoints, for
example of EW and of Rep-MTL, one after the other; they must be of the same model. Writes the exponent
of every layer to powerlaw.csv.
"""

from __future__ import annotations

import argparse
import csv

from repmtl_ray import cli
from repmtl_ray.config import differences


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, and the folder of the table."""
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="folder of a checkpoint"
    )
    parser.add_argument("--out", default="results", help="folder (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Fits the layers of every checkpoint."""
    from repmtl_ray.runs.checkpoint import read_experiment
    from repmtl_ray.studies.powerlaw import checkpoint_exponents, exponents_table

    experiments = [read_experiment(directory) for directory in arguments.checkpoints]
    for directory, experiment in zip(arguments.checkpoints, experiments, strict=True):
        if experiment.model != experiments[0].model:
            raise ValueError(
                f"checkpoint {directory} is of another configuration than {arguments.checkpoints[0]}: "
                f"model {differences(experiments[0].model, experiment.model)}; their exponents are not compared."
            )
    out = cli.folder(arguments.out)
    rows = []
    for directory, experiment in zip(arguments.checkpoints, experiments, strict=True):
        parts = checkpoint_exponents(directory)
        losses = "log losses" if experiment.policy.log_losses else "plain losses"
        print(f"{directory} ({experiment.policy.name}, {losses})\n{exponents_table(parts)}\n")
        for part in parts:
            for layer in part.layers:
                rows.append(
                    [
                        directory,
                        part.name,
                        layer.name,
                        layer.exponent,
                        layer.num_eigenvalues,
                        layer.distance,
                    ]
                )
    with (out / "powerlaw.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["checkpoint", "part", "layer", "exponent", "num_eigenvalues", "distance"])
        writer.writerows(rows)
    print(f"layers     {out / 'powerlaw.csv'}")
