"""Trains one experiment from its file, for example the best of a search.

    python pipelines/train.py results/best.json [--workers 2] [--set epochs=50 --set
    regularizer.lambda_tsr=0.9]

Prints the metrics of every epoch and the path of the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, from_dict, replace
from repmtl_ray.train import fit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path, help="JSON file as a search leaves it (best.json)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a value (JSON, or a string)",
    )
    parser.add_argument(
        "--workers",
        type=cli.num_workers,
        default=1,
        metavar="N or LEAST:MOST",
        help="data-parallel processes (default: %(default)s)",
    )
    parser.add_argument("--cpus-per-worker", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="default: %(default)s")
    parser.add_argument("--storage", help="folder or URI for checkpoints")
    cli.add_checkpoint_options(parser)
    parser.add_argument("--name", help="of the run; the name of an interrupted run continues it")
    arguments = parser.parse_args()
    if not arguments.experiment.is_file():
        raise ValueError(f"{arguments.experiment} is not a file; give the best.json of a search.")
    experiment = _read(arguments.experiment)
    result = fit(
        replace(experiment, dict(_assignment(text) for text in arguments.set)),
        placement=Placement(
            num_workers=arguments.workers,
            cpus_per_worker=arguments.cpus_per_worker,
            gpus_per_worker=arguments.gpus_per_worker,
        ),
        storage=arguments.storage,
        name=arguments.name,
        checkpoints=cli.checkpoints_of(arguments),
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


def _read(path: Path) -> Experiment:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not the fields of an experiment")
        return from_dict(Experiment, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} describes no experiment: {error}") from error


def _assignment(text: str) -> tuple[str, object]:
    path, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r}: expected PATH=VALUE, for example epochs=50.")
    try:
        return path, json.loads(value)
    except json.JSONDecodeError:
        return path, value


if __name__ == "__main__":
    cli.main(main)
