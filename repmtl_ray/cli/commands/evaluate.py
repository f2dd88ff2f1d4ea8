"""The metrics of a trained model on a split of its data set.

    repmtl-ray evaluate CHECKPOINT
    repmtl-ray evaluate CHECKPOINT --data DIR --split test --json

CHECKPOINT is a folder or URI as `train` and a search's table name it, or the file that `export`
writes. Prints a table, or with --json one line of JSON for another program. Evaluates in this process,
without Ray.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from repmtl_ray import cli
from repmtl_ray.report.table import aligned


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the data and the split."""
    parser.add_argument("checkpoint", help="folder or URI of a checkpoint, or an exported file")
    parser.add_argument("--data", metavar="DIR", help="the data, if not where the run had it")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "holdout"),
        help="default: the split that the run was evaluated on",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def run(arguments: argparse.Namespace) -> None:
    """Evaluates, and prints the metrics."""
    from repmtl_ray.inference import evaluate, load_model

    model = load_model(arguments.checkpoint, device=cli.device(arguments.device))
    metrics = evaluate(model, arguments.split, data_path=arguments.data)
    split = arguments.split or model.experiment.data.eval_split
    if arguments.json:
        print(json.dumps({"checkpoint": arguments.checkpoint, "split": split, "metrics": metrics}))
    else:
        print(f"{arguments.checkpoint}\n{model.experiment.data.name}, {split} split\n")
        print(text(metrics))


def text(metrics: Mapping[str, float]) -> str:
    """The metrics as a table, with the direction of those that have one."""
    from repmtl_ray.metrics import higher_is_better

    words: dict[bool | None, str] = {True: "higher", False: "lower"}
    rows = []
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        rows.append([task, metric, f"{value:.4f}", words.get(higher_is_better(metric), "")])
    return aligned(["task", "metric", "value", "better"], rows)
