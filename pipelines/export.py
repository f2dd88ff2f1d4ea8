"""Writes the model of a checkpoint as one safetensors file, for use elsewhere.

    python pipelines/export.py CHECKPOINT --out model.safetensors [--encoder]

CHECKPOINT is a folder or URI as `fit` and the results of a search name it. The file holds tensors
and the experiment's description, no code; `repmtl_ray.runs.export.import_model` reads it back, and with
--encoder the setting model.weights does. Takes seconds; needs no Ray.
"""

from __future__ import annotations

from pathlib import Path

from repmtl_ray import cli
from repmtl_ray.cli.options import new_parser
from repmtl_ray.config import digest
from repmtl_ray.runs.export import export_model


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="folder or URI of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--encoder", action="store_true", help="the encoder alone, under timm's names"
    )
    arguments = parser.parse_args()
    experiment = export_model(arguments.checkpoint, arguments.out, encoder_only=arguments.encoder)
    print(
        f"{arguments.out}  {arguments.out.stat().st_size / 1e6:.1f} MB  experiment {digest(experiment)}"
    )


if __name__ == "__main__":
    cli.main(main)
