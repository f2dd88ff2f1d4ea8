"""Every task's prediction for photographs, as numbers and as pictures.

    repmtl-ray predict CHECKPOINT photo.jpg other.png --out DIR
    repmtl-ray predict CHECKPOINT FOLDER --out DIR --write panels

CHECKPOINT is a folder or URI as `train` and a search's table name it, or the file that `export`
writes. Photographs are JPEG or PNG files, or folders of them. They are resized (bilinear) to the size
that the model was trained on, and predictions have that size. For every photograph and every task that
predicts a map it writes NAME.TASK.npy (classes, metres, inverse depth or unit normals) and
NAME.TASK.png (classes as the values of a coloured palette; else colours to look at); and NAME.panel.png
with all of them beside the photograph. predictions.csv lists them, and has the class and its
probability for tasks that classify images. Predicts in this process, without Ray.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import cli

FORMS = ("npy", "png", "panels")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, the photographs, and what is written."""
    parser.add_argument("checkpoint", help="folder or URI of a checkpoint, or an exported file")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photographs, or their folders")
    parser.add_argument("--out", default="predictions", help="folder (default: %(default)s)")
    parser.add_argument(
        "--write", nargs="+", choices=FORMS, default=list(FORMS), help="default: all of them"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="photographs at once (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Predicts for every photograph, and writes the files."""
    from repmtl_ray.inference import load_model
    from repmtl_ray.report.predictions import find_photographs, write_predictions

    paths = find_photographs([Path(image) for image in arguments.images])
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; expected at least 1.")
    model = load_model(arguments.checkpoint, device=cli.device(arguments.device))
    out = cli.folder(arguments.out)
    num_files = write_predictions(
        model, paths, out, forms=arguments.write, batch_size=arguments.batch_size
    )
    print(
        f"{len(paths)} photograph{'s' * (len(paths) > 1)}, {num_files} files in {out}; "
        f"{out / 'predictions.csv'} lists them"
    )
