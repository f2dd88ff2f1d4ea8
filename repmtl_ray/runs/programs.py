"""A trained model as a program: for `torch.export` and for ONNX, without this project's code.

Owns the module that is traced, which normalises the images itself, and the description of a model from
which plain timm and torch build it again (docs/export.md has the script). No Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repmtl_ray import extras
from repmtl_ray.config import SEGNET, Experiment
from repmtl_ray.data.description import DataDescription
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.encoders import encoder_arguments, keeps_channels_last

INPUT = "images"
MAX_ROWS = 4096
"""Rows of a batch that a program takes, at most."""


class Program(nn.Module):
    """A model with the normalisation of its images.

    Args:
        network: in eval mode.
        data: that it was trained on.
    """

    def __init__(self, network: MultiTaskModel, data: DataDescription) -> None:
        super().__init__()
        self.network = network
        self.tasks = [task.name for task in data.tasks]
        self.mean: Tensor
        self.deviation: Tensor
        mean, deviation = data.mean or (0.0, 0.0, 0.0), data.deviation or (1.0, 1.0, 1.0)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Every task's prediction, in the order of the tasks.

        Args:
            images: [rows, 3, H, W], float32 in 0..1, of the size that the model was trained on.
        """
        predictions = self.network((images - self.mean) / self.deviation)
        return tuple(predictions[task] for task in self.tasks)


def export_program(
    network: MultiTaskModel, data: DataDescription, out: Path
) -> torch.export.ExportedProgram:
    """Writes a model as a program of `torch.export` (.pt2), for any number of images.

    Args:
        network: the model, in eval mode, on the CPU.
        data: that it was trained on.
        out: the file; `torch.export.load(out).module()(images)` gives a tuple of predictions.
    """
    program = _traced(network, data)
    torch.export.save(program, out)
    return program


def export_onnx(network: MultiTaskModel, data: DataDescription, out: Path) -> None:
    """Writes a model in the ONNX format, for any number of images.

    Args:
        network, data: as for `export_program`.
        out: the file; its input is "images", its outputs are named after the tasks.

    Raises:
        ValueError: a library is not installed, or the model has an operation that ONNX has not.
    """
    extras.require("ONNX", "onnx")
    module = Program(network, data).eval()
    height, width = data.size_of_images
    try:
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, height, width),),
            str(out),
            input_names=[INPUT],
            output_names=module.tasks,
            dynamic_shapes=({0: torch.export.Dim("rows", max=MAX_ROWS)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ValueError(f"the model cannot be written as ONNX: {str(error)[:300]}") from error


def _traced(network: MultiTaskModel, data: DataDescription) -> torch.export.ExportedProgram:
    height, width = data.size_of_images
    example = torch.zeros(2, 3, height, width)
    rows = torch.export.Dim("rows", max=MAX_ROWS)
    return torch.export.export(
        Program(network, data).eval(), (example,), dynamic_shapes=({0: rows},)
    )


def plain_description(
    experiment: Experiment, data: DataDescription, network: MultiTaskModel
) -> dict[str, Any]:
    """What timm and torch must know to build a model again: names, sizes and arguments.

    Raises:
        ValueError: SegNet-MTAN, which is no network of timm.
    """
    model = experiment.model
    if model.encoder == SEGNET:
        raise ValueError(f"encoder {SEGNET!r} is no network of timm; export a .pt2 or .onnx file.")
    size = data.size_of_images
    head: dict[str, Any] = {"kind": model.head}
    if model.head == "aspp":
        head |= {"width": model.head_channels, "rates": list(model.atrous_rates)}
    backbone = network.encoder if model.bottleneck is None else network.encoder.backbone
    assert isinstance(backbone, nn.Module)
    with torch.no_grad():
        features = network.encoder(torch.zeros(1, 3, *size))
    return {
        "encoder": model.encoder,
        "encoder_arguments": encoder_arguments(model, size),
        "features": model.features,
        "channels_last": model.features == "map" and keeps_channels_last(backbone),
        "num_channels": features.shape[2 if model.features == "tokens" else 1],
        "bottleneck": model.bottleneck,
        "head": head,
        "image_size": list(size),
        "mean": list(data.mean or (0.0, 0.0, 0.0)),
        "deviation": list(data.deviation or (1.0, 1.0, 1.0)),
        "tasks": [
            {
                "name": task.name,
                "kind": task.kind,
                "dense": task.dense,
                "num_outputs": task.num_outputs,
            }
            for task in data.tasks
        ],
    }


def write_description(out: Path, description: dict[str, Any]) -> None:
    """Writes a description as JSON beside the file of the tensors."""
    out.write_text(json.dumps(description, indent=2) + "\n")
