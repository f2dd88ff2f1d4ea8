"""Targets and predictions as colours, and the pictures of a run's predictions while it trains.

Owns the colours of every kind of map and the layout of a picture: a row for each image with the image,
what is true, and what is predicted. Needs matplotlib. No Ray.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray

from repmtl_ray.config import ExperimentError
from repmtl_ray.data.collate import collate
from repmtl_ray.data.columns import IGNORE_LABEL, IMAGE, SAMPLE_ID
from repmtl_ray.data.stream import Kind
from repmtl_ray.runs.build import DTYPES
from repmtl_ray.runs.callbacks import RunContext
from repmtl_ray.runs.evaluate import predictions_of
from repmtl_ray.runs.parameters import evaluating
from repmtl_ray.tasks import Task

Array = NDArray[Any]
CLASS_COLORS = colormaps["tab20"](np.arange(256) % 20)[:, :3]
"""RGB of the classes of a map, in 0..1."""


class LoggedPictures:
    """Pictures of what the model of a run predicts for the first samples of its evaluation split.

    Args:
        context: of the run.
        num_images: at most; samples of one stream.

    Raises:
        ExperimentError: no task of the run predicts a map for an image.
    """

    def __init__(self, context: RunContext, num_images: int) -> None:
        stream = context.evaluation.streams[0]
        rows = context.evaluation.rows[stream.name]
        self._context = context
        self._tasks = [t for t in context.tasks if t.dense and t.name in stream.kinds]
        if IMAGE not in stream.inputs or not self._tasks:
            raise ExperimentError("log_images: no task of this run predicts a map; leave it out.")
        names = [task.name for task in self._tasks]
        first = np.arange(min(num_images, len(rows)))
        samples = rows.fetch(first, [SAMPLE_ID, *stream.inputs, *names])
        self._images = samples[IMAGE]
        self._batch = collate([(stream, samples)], names, DTYPES[context.experiment.precision])

    def draw(self) -> dict[str, NDArray[np.uint8]]:
        """By task, a picture [images * H, 3 * W, 3] with the predictions of this moment."""
        context, model = self._context, self._context.parts.model
        rows = {task.name: self._batch.rows[task.name] for task in self._tasks}
        with torch.no_grad(), evaluating(model):
            predictions = predictions_of(
                model, self._batch, rows, context.device, context.experiment.precision
            )
        return {task.name: self._picture(task, predictions[task.name]) for task in self._tasks}

    def _picture(self, task: Task, prediction: torch.Tensor) -> NDArray[np.uint8]:
        targets, predicted = (
            self._batch.targets[task.name].numpy(),
            prediction.float().cpu().numpy(),
        )
        rows = [
            [target_image(image, "image"), *target_and_prediction(task.kind, target, output)]
            for image, target, output in zip(self._images, targets, predicted, strict=True)
        ]
        return np.concatenate([np.concatenate([*map(as_bytes, row)], axis=1) for row in rows])


def target_and_prediction(kind: Kind, target: Array, prediction: Array) -> tuple[Array, Array]:
    """Both as colours [H, W, 3] of one scale.

    Args:
        kind: of the task.
        target: as in a batch, [H, W] of classes or [channels, H, W].
        prediction: [num_outputs, H, W], as the network gives it.
    """
    truth = target if kind == "label" else target.transpose(1, 2, 0)
    nearest = brightest(truth, kind) if kind in ("depth", "inverse_depth") else None
    predicted = values_of(kind, prediction)
    return (
        target_image(truth, kind, nearest=nearest),
        target_image(predicted, kind, nearest=nearest),
    )


def values_of(kind: Kind, prediction: Array) -> Array:
    """A predicted map as the values of its kind.

    Args:
        kind: of the task.
        prediction: [num_outputs, H, W], as the network gives it.

    Returns:
        Classes [H, W]; metres or inverse depth [H, W, 1]; normals of length 1 [H, W, 3].
    """
    if kind == "label":
        return prediction.argmax(axis=0).astype(np.int16)
    values = prediction.transpose(1, 2, 0).astype(np.float32)
    if kind == "normal":
        values = values / np.maximum(np.linalg.norm(values, axis=2, keepdims=True), 1e-6)
    return values


def target_image(values: Array, kind: Kind, *, nearest: float | None = None) -> Array:
    """A target as colours [H, W, 3], in 0..1 or as bytes; what no loss reads is black.

    Args:
        values: labels [H, W]; depth, inverse depth [H, W, 1]; normals or an image [H, W, 3].
        kind: of the target.
        nearest: inverse depth of the brightest colour; None takes the 99th percentile of `values`.
    """
    if kind == "label":
        ignored = (values == IGNORE_LABEL)[:, :, None]
        return np.where(ignored, 0.0, CLASS_COLORS[np.clip(values, 0, 255)])
    if kind in ("depth", "inverse_depth"):
        inverse = _inverse_depth(values, kind)
        top = nearest or brightest(values, kind)
        return np.where(inverse[:, :, None] > 0, colormaps["viridis"](inverse / top)[:, :, :3], 0.0)
    if kind == "normal":
        valid = np.linalg.norm(values, axis=2, keepdims=True) > 0.5
        return np.where(valid, np.clip((values + 1) / 2, 0, 1), 0.0)
    return values if values.dtype == np.uint8 else np.clip(values, 0, 1)


def as_bytes(colors: Array) -> NDArray[np.uint8]:
    """Colours in 0..1, or bytes already, as bytes."""
    return colors if colors.dtype == np.uint8 else (255 * colors).round().astype(np.uint8)


def brightest(values: Array, kind: Kind) -> float:
    """The inverse depth of the brightest colour of a map: the 99th percentile of what is valid."""
    inverse = _inverse_depth(values, kind)
    valid = inverse[inverse > 0]
    return float(np.percentile(valid, 99)) if valid.size else 1.0


def _inverse_depth(values: Array, kind: Kind) -> Array:
    """Inverse depth [H, W], 0 where there is none."""
    plane = values[:, :, 0].astype(np.float64)
    if kind == "inverse_depth":
        return np.maximum(plane, 0)
    return np.where(plane > 0, 1 / np.where(plane > 0, plane, 1), 0)
