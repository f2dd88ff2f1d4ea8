"""Writes the model of a checkpoint as one safetensors file, for use elsewhere.

    repmtl-ray export CHECKPOINT --out model.safetensors [--encoder]

CHECKPOINT is a folder or URI as `fit` and the results of a search name it. The file holds tensors
and the experiment's description, no code; `repmtl_ray.runs.export.import_model` reads it back, and with
--encoder the setting model.weights does. Takes seconds; needs no Ray.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray.config import digest


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and what is written of it."""
    parser.add_argument("checkpoint", help="folder or URI of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--encoder", action="store_true", help="the encoder alone, under timm's names"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and says how large it is."""
    from repmtl_ray.runs.export import export_model

    experiment = export_model(arguments.checkpoint, arguments.out, encoder_only=arguments.encoder)
    print(
        f"{arguments.out}  {arguments.out.stat().st_size / 1e6:.1f} MB  experiment {digest(experiment)}"
    )
