"""Trained models in use: load one, evaluate it on a split, predict for images.

Owns the three functions and what they return. Training is in `train.py`, the files are those of
`runs/checkpoint.py` and `runs/export.py`. No Ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from repmtl_ray import storage
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.description import DataDescription, tasks_of
from repmtl_ray.data.sources import open_streams
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.compute import autocast_to
from repmtl_ray.models.own import ModelFunction
from repmtl_ray.runs import checkpoint, export, loop

SplitName = Literal["train", "val", "test", "holdout"]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with what it was trained as.

    Args:
        network: in eval mode.
        experiment: of its run.
        data: the tasks, image size and normalisation that it knows.
    """

    network: MultiTaskModel
    experiment: Experiment
    data: DataDescription

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def load_model(
    source: str | Path,
    *,
    model: ModelFunction | None = None,
    device: torch.device | str = "cpu",
) -> TrainedModel:
    """The model of a checkpoint or of an exported file. The data are not needed.

    Args:
        source: folder or URI of a checkpoint (`FitResult.checkpoint`), or the file that
            `repmtl-ray export` writes.
        model: the function that made a model of your own, which no file holds.
        device: where the model is to be.

    Raises:
        ValueError: neither of the two, a damaged one, or weights that are not finite.
    """
    path = Path(source)
    with storage.explained(str(source)):
        is_file = path.suffix == ".safetensors" or path.is_file()
    if is_file:
        network, experiment = export.import_model(path)
        data = export.read_exported_description(path)
    else:
        network = checkpoint.read_model(source, model)
        experiment, data = checkpoint.read_experiment(source), checkpoint.read_description(source)
    return TrainedModel(network=network.to(device), experiment=experiment, data=data)


def evaluate(
    model: TrainedModel, split: SplitName | None = None, *, data_path: str | None = None
) -> dict[str, float]:
    """Every task's metrics and mean loss over a split of the data set that the model was trained on.

    Args:
        model: of a data set that this project reads.
        split: None takes the split that the run was evaluated on.
        data_path: where the data are on this machine, if not where the run had them.

    Returns:
        For example {"depth/abs_error": ..., "depth/loss": ...}, as after an epoch of the run.

    Raises:
        ValueError: an unknown split, data that cannot be read, or data of the user's own.
    """
    data = model.experiment.data
    if split is not None and split not in get_args(SplitName):
        raise ValueError(f"split is {split!r}; expected one of {', '.join(get_args(SplitName))}.")
    if data.name == "custom":
        raise ValueError(
            "the model was trained on data of your own, which no configuration describes; call `predict` with their "
            "images, or `fit` with `epochs` as they are, which returns the metrics of the evaluation data."
        )
    if data_path is not None:
        # The other fields are of rendered scenes alone.
        data = dataclasses.replace(data, path=data_path, num_train=None, num_val=None, scene_seed=0)
    streams = open_streams(data, split or data.eval_split)
    return loop.evaluate_split(
        model.experiment,
        tasks_of(model.data),
        model.network,
        loop.Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams}),
        workers=ALONE,
        device=model.device,
    )


@torch.no_grad()
def predict(
    model: TrainedModel, images: ArrayLike | Tensor, *, batch_size: int = 16
) -> dict[str, Tensor]:
    """Every task's prediction for images.

    Args:
        model: on any device.
        images: [N, H, W, 3], uint8 in 0..255 or floats in 0..1, of the size that the model was
            trained on; they are normalised here.
        batch_size: images per forward pass; it limits the memory and changes no prediction.

    Returns:
        By task, on the CPU: [N, num_outputs, H, W] for maps, [N, num_outputs] for vectors; logits
        of classes, metres, inverse depth, or normals of any length.

    Raises:
        ValueError: another shape, size or kind of number.
    """
    pixels = torch.as_tensor(images)
    if model.data.image_size is None:
        raise ValueError(
            f"the model takes {', '.join(model.data.inputs)} and no images; call model.network with "
            "tensors of these inputs by name."
        )
    height, width = model.data.image_size
    if pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3) or not len(pixels):
        raise ValueError(
            f"images have shape {tuple(pixels.shape)}; expected [N, {height}, {width}, 3], the size that the model was "
            "trained on: resize them, and give one image as images[None]."
        )
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"images are {pixels.dtype}; expected uint8 in 0..255, or floats in 0..1.")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a number of images from 1.")
    precision = model.experiment.precision
    outputs: list[dict[str, Tensor]] = []
    for batch in pixels.split(batch_size):
        inputs = _normalised(batch, model.data, loop.DTYPES[precision]).to(model.device)
        with autocast_to(precision, model.device):
            outputs.append(model.network(inputs))
    return {task: torch.cat([part[task].cpu() for part in outputs]) for task in outputs[0]}


def _normalised(pixels: Tensor, data: DataDescription, dtype: torch.dtype) -> Tensor:
    """[N, H, W, 3] as the network's input [N, 3, H, W], as `data.collate` makes it."""
    inputs = pixels.to(dtype).permute(0, 3, 1, 2).contiguous()
    if pixels.dtype == torch.uint8:
        inputs = inputs / 255
    if data.normalize is not None:
        mean, deviation = (
            torch.tensor(values, dtype=dtype).reshape(3, 1, 1) for values in data.normalize
        )
        inputs = (inputs - mean) / deviation
    return inputs
