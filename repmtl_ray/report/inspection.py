"""What the model of a checkpoint does with a few images: predictions, saliency, affinity of tasks.

Owns the arrays; `figures.py` draws them. Saliency is of the loss that the run trained on, log L_t or
L_t, where L_t is the mean over the images shown, in evaluation mode. No Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmtl_ray.config import Experiment
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.collate import collate
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.description import DataDescription, tasks_of
from repmtl_ray.data.own_rows import open_own_rows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.data.stream import Kind, Stream
from repmtl_ray.models.representation import representation_module
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.graph_split import split_graph_at
from repmtl_ray.runs.loop import DTYPES
from repmtl_ray.saliency import align_task_rows, channels_first
from repmtl_ray.tasks import Task

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A few images and what a checkpoint's model does with them. N images; for Office N per domain.

    Args:
        experiment: of the checkpoint.
        kinds: of the targets, by task.
        images: by task, [N, H, W, 3] in 0..1; the same for all dense tasks.
        targets: by task, as in a batch.
        predictions: by task, [N, outputs, H, W] or [N, outputs].
        saliency: |channel mean of S_t| (equation 4), [tasks, N, *positions].
        distribution: P (equation 5), [tasks, N, *positions]; 0 where no task has saliency.
        entropy: of P in nats, [N, *positions]; NaN where there is no P.
        information: of each position on the task, KL(P || mean P) in nats, [N, *positions]; its mean is
            the specialisation I of these images. NaN where there is no P.
        affinity: mean over samples of the cosine between the tasks' channel affinities S_t S_t^T
            (equation 7), [tasks, tasks]; NaN for a task without saliency.
    """

    experiment: Experiment
    kinds: Mapping[str, Kind]
    images: Mapping[str, Array]
    targets: Mapping[str, Array]
    predictions: Mapping[str, Array]
    saliency: Array
    distribution: Array
    entropy: Array
    information: Array
    affinity: Array

    @property
    def tasks(self) -> list[str]:
        return list(self.predictions)


def inspect_checkpoint(
    directory: str | Path,
    *,
    num_images: int = 4,
    split: Literal["train", "val", "test"] | None = None,
    data_path: str | None = None,
) -> Inspection:
    """Runs a checkpoint's model on the first images of a split.

    Args:
        directory: of the checkpoint.
        num_images: at most; per domain for Office.
        split: None takes the run's evaluation split.
        data_path: where the data is on this machine, if not where the run had it; for data of the
            user's own a Parquet file or a folder of such files.

    Raises:
        ValueError: the folder holds no checkpoint of this project or the weights of another
            configuration, or the data cannot be read.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; expected at least 1.")
    experiment = checkpoint.read_experiment(directory)
    model = checkpoint.read_model(directory)
    description = checkpoint.read_description(directory)
    tasks = tasks_of(description)
    streams = _streams(experiment, description, num_images, split, data_path)
    samples = [
        (stream, LocalRows(stream).fetch(np.arange(min(num_images, stream.num_samples))))
        for stream in streams
    ]
    batch = collate(samples, [task.name for task in tasks], DTYPES[experiment.precision])
    predictions, saliency = _predictions_and_saliency(model, tasks, batch, experiment)
    magnitude, distribution, entropy = task_distribution(saliency)
    images = torch.cat([_unit_range(stored["image"]) for _, stored in samples]).numpy()
    return Inspection(
        experiment=experiment,
        kinds={name: stream.kinds[name] for stream in streams for name in stream.kinds},
        images={task.name: images[batch.rows[task.name]] for task in tasks},
        targets={name: target.numpy() for name, target in batch.targets.items()},
        predictions={name: value.float().numpy() for name, value in predictions.items()},
        saliency=magnitude.numpy(),
        distribution=distribution.numpy(),
        entropy=entropy.numpy(),
        information=position_information(distribution).numpy(),
        affinity=task_affinity(saliency).numpy(),
    )


def _streams(
    experiment: Experiment,
    description: DataDescription,
    num_images: int,
    split: Literal["train", "val", "test"] | None,
    data_path: str | None,
) -> list[Stream]:
    """The streams of the images, with targets of at least one task."""
    data = experiment.data
    if data.name == "custom":
        if data_path is None:
            raise ValueError(
                "the model was trained on data of your own; give a folder of Parquet files with the same columns, as "
                "Dataset.write_parquet(folder) leaves it (--data FOLDER)."
            )
        if split is not None:
            raise ValueError(f"split is {split!r}, but data of your own have none; leave it out.")
        return [open_own_rows(data_path, description, num_images)]
    if data_path is not None:
        data = dataclasses.replace(data, path=data_path, num_train=None, num_val=None, scene_seed=0)
    names = [task.name for task in description.tasks]
    streams = open_streams(data, split or data.eval_split)
    return [stream for stream in streams if any(name in stream.kinds for name in names)]


def _predictions_and_saliency(
    model: Any, tasks: Sequence[Task], batch: Batch, experiment: Experiment
) -> tuple[dict[str, Tensor], Tensor]:
    """Predictions by task, detached, and the saliency [tasks, N, channels, *positions]."""
    size = (batch.images.shape[-2], batch.images.shape[-1])
    with (
        torch.enable_grad(),
        split_graph_at(representation_module(model, experiment.model.representation)) as split,
    ):
        representation = model.encoder(batch.images)
        predictions = {
            task.name: model.predict(task.name, representation[batch.rows[task.name]], size)
            for task in tasks
        }
    gradients = []
    for task in tasks:
        total, count = task.loss_sum(predictions[task.name], batch.targets[task.name])
        loss = total / torch.where(count > 0, count, 1.0)
        # The gradient of log L is the gradient of L divided by L.
        scale = loss.detach() if experiment.policy.log_losses and loss > 0 else 1.0
        (gradient,) = torch.autograd.grad(loss / scale, split.leaf, retain_graph=True)
        gradients.append(gradient)
    aligned = align_task_rows(gradients, [batch.rows[task.name] for task in tasks])
    detached = {name: prediction.detach() for name, prediction in predictions.items()}
    return detached, channels_first(aligned, model.channel_axis)


def task_distribution(saliency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5: the magnitudes, the distribution P over tasks, and the entropy of P.

    Args:
        saliency: [tasks, batch, channels, *positions].

    Returns:
        |channel mean| and P, [tasks, batch, *positions], and the entropy of P in nats, [batch,
        *positions], NaN where every task's channel mean is zero.
    """
    magnitude = saliency.double().mean(dim=2).abs()
    total = magnitude.sum(dim=0)
    carries = total > 0
    distribution = magnitude / torch.where(carries, total, 1.0)
    entropy = torch.special.entr(distribution).sum(dim=0)
    return magnitude, distribution, torch.where(carries, entropy, torch.nan)


def position_information(distribution: Tensor) -> Tensor:
    """What each position says about the task: KL(P || mean P), whose mean is H(mean P) - TSR.

    Args:
        distribution: P, [tasks, batch, *positions], of `task_distribution`.

    Returns:
        [batch, *positions] in nats, NaN where there is no P.
    """
    carries = distribution.sum(dim=0) > 0
    mean = distribution.flatten(1).sum(dim=1) / carries.sum()
    shape = (-1, *[1] * (distribution.dim() - 1))
    ratio = distribution / torch.where(mean > 0, mean, 1.0).reshape(shape)
    divergence = torch.special.xlogy(distribution, ratio).sum(dim=0)
    return torch.where(carries, divergence, torch.nan)


def task_affinity(saliency: Tensor) -> Tensor:
    """The cosines between the tasks' channel affinities.

    Args:
        saliency: [tasks, batch, channels, *positions].

    Returns:
        [tasks, tasks]: the mean over samples of <M_s, M_t> / (|M_s| |M_t|) with M_t = S_t S_t^T
        (equation 7), without building M: <M_s, M_t> = |S_s^T S_t|^2. Samples in which a task has no
        saliency are left out; NaN if no sample remains.
    """
    flat = saliency.double().flatten(3) if saliency.dim() > 3 else saliency.double().unsqueeze(3)
    peak = flat.abs().amax(dim=(2, 3), keepdim=True)
    flat = flat / torch.where(peak > 0, peak, 1.0)
    num_tasks = flat.shape[0]
    products = torch.stack(
        [
            (flat[s].transpose(1, 2) @ flat[t]).square().sum((1, 2))
            for s in range(num_tasks)
            for t in range(num_tasks)
        ]
    ).unflatten(0, (num_tasks, num_tasks))
    norms = products.diagonal(dim1=0, dim2=1).sqrt()  # [batch, tasks]
    cosines = products / (norms.T[:, None] * norms.T[None, :])
    return cosines.nanmean(dim=2)


def _unit_range(stored: Array) -> Tensor:
    """Images [N, H, W, 3] as stored, as floats in 0..1."""
    images = torch.from_numpy(stored)
    return images.float() / 255 if stored.dtype == np.uint8 else images.float()
