"""What a checkpoint sees in a few images: predictions, saliency, and how its tasks share the image.

Owns the numbers behind the pictures, from a checkpoint to arrays; drawing them is in `figures.py`.
Saliency is of log L_t or L_t as the run trained on, with L_t the mean over the images shown, in eval
mode. No Ray.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from repmtl_ray.data.sources import open_streams, tasks_of
from repmtl_ray.data.stream import Kind
from repmtl_ray.models import representation_module
from repmtl_ray.runs import checkpoint
from repmtl_ray.runs.cut import cut_at
from repmtl_ray.runs.loop import DTYPES
from repmtl_ray.runs.step import paired_saliency
from repmtl_ray.saliency import arrange

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Look:
    """A few images through a checkpoint's model. N images; for Office N of every domain.

    Args:
        experiment: of the checkpoint.
        kinds: of the targets, by task.
        images: by task, [N, H, W, 3] in 0..1; the same for all dense tasks.
        targets: by task, as in a batch.
        predictions: by task, [N, outputs, H, W] or [N, outputs].
        saliency: |channel mean of S_t| (equation 4), [T, N, *positions].
        distribution: P (equation 5), like it; 0 where no task has saliency.
        entropy: of P in nats, [N, *positions]; nan where there is no P.
        affinity: mean over samples of the cosine between the tasks' channel affinities S_t S_t^T
            (equation 7), [T, T]; nan for a task without saliency.
    """

    experiment: Experiment
    kinds: Mapping[str, Kind]
    images: Mapping[str, Array]
    targets: Mapping[str, Array]
    predictions: Mapping[str, Array]
    saliency: Array
    distribution: Array
    entropy: Array
    affinity: Array

    @property
    def tasks(self) -> list[str]:
        return list(self.predictions)


def look(
    directory: str | Path,
    *,
    num_images: int = 4,
    split: Literal["train", "val", "test"] | None = None,
    data_path: str | None = None,
) -> Look:
    """Runs a checkpoint's model on the first images of a split.

    Args:
        directory: of the checkpoint.
        num_images: at most; of each domain for Office.
        split: None takes the run's evaluation split.
        data_path: where the data is on this machine, if not where the run had it.

    Raises:
        ValueError: no checkpoint of this project, one whose weights are another configuration's, or
            data that cannot be read.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; expected at least 1.")
    experiment = checkpoint.read_experiment(directory)
    model = checkpoint.read_model(directory)
    data = experiment.data
    if data_path is not None:
        data = dataclasses.replace(data, path=data_path)
    names = experiment.tasks or tuple(task.name for task in tasks_of(data))
    tasks = [task for task in tasks_of(data) if task.name in names]
    streams = [
        stream
        for stream in open_streams(data, split or data.eval_split)
        if any(name in stream.kinds for name in names)
    ]
    parts = [
        (stream, LocalRows(stream).fetch(np.arange(min(num_images, stream.num_samples))))
        for stream in streams
    ]
    batch = collate(parts, [task.name for task in tasks], DTYPES[experiment.precision])
    size = (batch.images.shape[-2], batch.images.shape[-1])
    with (
        torch.enable_grad(),
        cut_at(representation_module(model, experiment.model.representation)) as cut,
    ):
        representation = model.encoder(batch.images)
        predictions = [
            model.predict(task.name, representation[batch.rows[task.name]], size) for task in tasks
        ]
    saliencies = []
    for task, prediction in zip(tasks, predictions, strict=True):
        total, count = task.loss_sum(prediction, batch.targets[task.name])
        loss = total / count.clamp(min=1)
        scale = loss.detach() if experiment.policy.log_losses and loss > 0 else 1.0
        (gradient,) = torch.autograd.grad(loss / scale, cut.leaf, retain_graph=True)
        saliencies.append(gradient)
    paired = paired_saliency(saliencies, [batch.rows[task.name] for task in tasks])
    arranged = arrange(paired, model.channel_axis)
    magnitude, distribution, entropy = shares(arranged)
    shown = torch.cat([_shown(stream, samples["image"]) for stream, samples in parts]).numpy()
    return Look(
        experiment=experiment,
        kinds={name: stream.kinds[name] for stream in streams for name in stream.kinds},
        images={task.name: shown[batch.rows[task.name]] for task in tasks},
        targets={name: target.numpy() for name, target in batch.targets.items()},
        predictions={
            task.name: prediction.detach().float().numpy()
            for task, prediction in zip(tasks, predictions, strict=True)
        },
        saliency=magnitude.numpy(),
        distribution=distribution.numpy(),
        entropy=entropy.numpy(),
        affinity=affinity(arranged).numpy(),
    )


def shares(saliency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5, and the entropy of what they give.

    Args:
        saliency: [tasks, batch, channels, *positions].

    Returns:
        |channel mean| and P, [tasks, batch, *positions], and the entropy of P in nats, [batch,
        *positions], nan where every task's channel mean is zero.
    """
    magnitude = saliency.double().mean(dim=2).abs()
    total = magnitude.sum(dim=0)
    carries = total > 0
    distribution = magnitude / torch.where(carries, total, 1.0)
    entropy = torch.special.entr(distribution).sum(dim=0)
    return magnitude, distribution, torch.where(carries, entropy, torch.nan)


def affinity(saliency: Tensor) -> Tensor:
    """How alike the tasks' channel affinities are.

    Args:
        saliency: [tasks, batch, channels, *positions].

    Returns:
        [tasks, tasks]: the mean over samples of <M_s, M_t> / (|M_s| |M_t|) with M_t = S_t S_t^T
        (equation 7), without building M: <M_s, M_t> = |S_s^T S_t|^2. Samples in which a task has no
        saliency are left out; nan if that is all.
    """
    flat = saliency.double().flatten(3) if saliency.dim() > 3 else saliency.double().unsqueeze(3)
    peak = flat.abs().amax(dim=(2, 3), keepdim=True)
    flat = flat / torch.where(peak > 0, peak, 1.0)
    tasks = flat.shape[0]
    products = torch.stack(
        [
            torch.stack(
                [(flat[s].transpose(1, 2) @ flat[t]).square().sum((1, 2)) for t in range(tasks)]
            )
            for s in range(tasks)
        ]
    )
    norms = products.diagonal(dim1=0, dim2=1).sqrt()  # [batch, tasks]
    cosines = products / (norms.T[:, None] * norms.T[None, :])
    return cosines.nanmean(dim=2)


def _shown(stream: Any, stored: Array) -> Tensor:
    images = torch.from_numpy(stored)
    return images.float() / 255 if stored.dtype == np.uint8 else images.float()
