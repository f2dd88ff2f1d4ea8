"""Writes the model of a checkpoint for use elsewhere; the end of --out says in which form.

    repmtl-ray export CHECKPOINT --out model.safetensors            tensors and model.json
    repmtl-ray export CHECKPOINT --out encoder.safetensors --encoder
    repmtl-ray export CHECKPOINT --out model.pt2                    a program of torch.export
    repmtl-ray export CHECKPOINT --out model.onnx                   for ONNX runtimes
    repmtl-ray export CHECKPOINT --out folder                       for the Hugging Face Hub

CHECKPOINT is a folder or URI as `fit` and the results of a search name it. None of the files can run
code. `load_model` reads model.safetensors, plain timm and torch build the model from it and model.json
(docs/export.md), and the setting model.weights reads what --encoder writes. The programs take images in
0..1 and normalise them. The folder has weights, configuration and a model card. Needs no Ray; ONNX
needs pip install "repmtl_ray[onnx]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repmtl_ray import storage
from repmtl_ray.config import Experiment, digest

FORMS = (".safetensors", ".pt2", ".onnx", "")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and what is written of it."""
    parser.add_argument("checkpoint", help="folder or URI of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument(
        "--encoder",
        action="store_true",
        help="the encoder alone, under timm's names (.safetensors)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and says how large it is."""
    out: Path = arguments.out
    if out.suffix not in FORMS:
        raise ValueError(
            f"--out {out} ends in {out.suffix!r}; expected .safetensors, .pt2, .onnx, or a folder's name."
        )
    if arguments.encoder and out.suffix != ".safetensors":
        raise ValueError(f"--encoder writes a .safetensors file; --out is {out}.")
    with storage.explained(str(out)):
        if out.exists():
            raise ValueError(f"{out} exists already; name another one, or remove it.")
    from repmtl_ray.runs.export import export_model

    if out.suffix == ".safetensors":
        experiment = export_model(arguments.checkpoint, out, encoder_only=arguments.encoder)
        if not arguments.encoder:
            _describe(out)
    else:
        experiment = _write_program(arguments.checkpoint, out)
    files = [out] if out.is_file() else sorted(out.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{out}  {size:.1f} MB  experiment {digest(experiment)}")


def _describe(out: Path) -> None:
    """model.json beside the tensors; SegNet-MTAN has none."""
    from repmtl_ray.config import SEGNET
    from repmtl_ray.inference import load_model
    from repmtl_ray.runs.programs import plain_description, write_description

    model = load_model(out)
    if model.experiment.model.encoder != SEGNET:
        description = plain_description(model.experiment, model.data, model.network)
        write_description(out.with_suffix(".json"), description)


def _write_program(checkpoint: str, out: Path) -> Experiment:
    from repmtl_ray.inference import load_model
    from repmtl_ray.runs import programs
    from repmtl_ray.runs.hub import hub_model

    storage.check_writable(str(out.absolute().parent))
    if not out.suffix:
        model = hub_model(checkpoint)
        model.save_pretrained(out)
        return model.experiment
    loaded = load_model(checkpoint)
    write = programs.export_program if out.suffix == ".pt2" else programs.export_onnx
    write(loaded.network, loaded.data, out)
    return loaded.experiment
