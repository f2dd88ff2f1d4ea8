"""Pictures of a checkpoint's model on a few images: predictions, saliency, and affinities of the tasks.

    repmtl-ray pictures CHECKPOINT --out DIR
    repmtl-ray pictures CHECKPOINT --images 6 --split val --tensorboard LOGS

Writes predictions.png, saliency.png (|S_t| of every task, the task distribution P, its entropy, the
information of each position on the task) and affinity.png (how similar the tasks' channel affinities
are). With --tensorboard it writes the same pictures as a TensorBoard log (pip install
"repmtl_ray[loggers]").
"""

from __future__ import annotations

import argparse

from repmtl_ray import cli


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the images, and where the pictures go."""
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--out", default="pictures", help="folder (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=4, help="how many; of each domain (default: %(default)s)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: the run's")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="the data, if not where the run had it; Parquet files for data of your own",
    )
    parser.add_argument("--tensorboard", metavar="DIR", help="also write them as a TensorBoard log")


def run(arguments: argparse.Namespace) -> None:
    """Draws the pictures of one checkpoint."""
    from repmtl_ray.report import figures
    from repmtl_ray.report.inspection import inspect_checkpoint

    if arguments.tensorboard:
        cli.folder(arguments.tensorboard, "--tensorboard")
    inspection = inspect_checkpoint(
        arguments.checkpoint,
        num_images=arguments.images,
        split=arguments.split,
        data_path=arguments.data,
    )
    cli.folder(arguments.out)
    for path in figures.save_inspection(inspection, arguments.out):
        print(f"picture    {path}")
    if arguments.tensorboard:
        figures.log_tensorboard(inspection, arguments.tensorboard)
        print(
            f"log        {arguments.tensorboard}; look: tensorboard --logdir {arguments.tensorboard}"
        )
