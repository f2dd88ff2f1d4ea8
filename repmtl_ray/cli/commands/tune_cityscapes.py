"""Searches Rep-MTL's strength, coefficients and policy on street images.

    repmtl-ray tune cityscapes                 rendered street scenes, minutes on a laptop
    repmtl-ray tune cityscapes --data DIR      Cityscapes in any form, the paper's setting
    repmtl-ray tune cityscapes --resume NAME   continues an interrupted search; give the same other
                                               options

The two tasks are segmentation and inverse depth. The command joins the Ray cluster of this machine, or
starts a local one. It trains the single-task baselines first and keeps them for the next search. It
writes a table, a CSV, a picture of delta_p over (lambda_tsr, lambda_csa) and the best configuration.
The first form tries shares of the tasks' gradient from 0.05 to 0.3 for the penalty, and holds them against
EW on plain losses and on logs, constant weights, and Rep-MTL as printed, two seeds each. Under the
table stands what may be concluded from it. The paper's setting needs one GPU per trial:
--gpus-per-worker 1.
"""

from __future__ import annotations

import argparse

from repmtl_ray.cli import search
from repmtl_ray.cli.options import checked_seeds
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace

METRICS = ("segmentation/miou", "segmentation/pixel_accuracy", "depth/abs_error", "depth/rel_error")


def demonstration() -> Experiment:
    """Rendered streets at a quarter of the size and a small encoder; what `make tune` runs."""
    return Experiment(
        data=DataConfig(name="cityscapes", height=64, width=128, num_train=80, num_val=48),
        model=ModelConfig(
            encoder="test_efficientnet", head_channels=16, atrous_rates=(2, 4), dropout=0.0
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, halve_at_epoch=3),
        epochs=5,
        batch_size=4,
    )


def paper(data: str | None) -> Experiment:
    """The paper's setting (LibMTL): dilated ResNet-50, batch 64, 200 epochs, Adam 1e-4, halved at
    epoch 100."""
    return Experiment(
        data=DataConfig(name="cityscapes", path=data),
        optimizer=OptimizerConfig(halve_at_epoch=100),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of every search, and the scenes or the folder."""
    search.add_search_options(parser)
    data = parser.add_argument_group("the data")
    data.add_argument(
        "--data",
        metavar="DIR",
        help="npy folders, Parquet files or the official ones (default: rendered scenes)",
    )
    data.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="scale-crop and flip in training",
    )
    data.add_argument(
        "--preset",
        choices=("demo", "paper"),
        help="sizes, encoder, epochs (default: paper with --data, else demo)",
    )
    data.add_argument("--num-train", type=int, help="rendered scenes: how many to train on")
    data.add_argument("--num-val", type=int, help="rendered scenes: how many to evaluate on")
    data.add_argument(
        "--height", type=int, help="pixels; give --width too (default: the preset's, or as stored)"
    )
    data.add_argument("--width", type=int)
    data.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="runs of every row and grid point (default: 2 in the demonstration, else 1)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Searches, and writes the results."""
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width go together; give both or neither.")
    preset = arguments.preset or ("paper" if arguments.data else "demo")
    usual_seeds = 2 if preset == "demo" and arguments.space is None else 1
    num_seeds = len(checked_seeds(usual_seeds if arguments.seeds is None else arguments.seeds))
    experiment = paper(arguments.data) if preset == "paper" else demonstration()
    chosen = search.overrides(arguments) | {"data.augment": arguments.augment}
    if arguments.data and preset == "demo":
        chosen |= {"data.path": arguments.data, "data.num_train": None, "data.num_val": None}
        chosen |= {"data.height": None, "data.width": None}
    for option in ("num_train", "num_val", "height", "width"):
        if getattr(arguments, option) is not None:
            chosen[f"data.{option}"] = getattr(arguments, option)
    space = "joint" if preset == "paper" else "bounded_grid"
    if space == "bounded_grid" and arguments.searcher == "optuna":
        space = "bounded"  # Optuna searches no grid
    search.run_search(
        replace(experiment, chosen),
        arguments,
        space=space,
        samples=20 if preset == "paper" else 6,
        rows=search.ROWS if preset == "demo" and arguments.space is None else None,
        num_seeds=num_seeds,
        metrics=METRICS,
        data_title=f"Cityscapes, {arguments.data}"
        if arguments.data
        else "rendered street scenes (not Cityscapes)",
    )
