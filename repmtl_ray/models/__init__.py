"""The multi-task model: one shared encoder, one head per task, and the place of the saliency.

Owns the forward pass, and the construction of a model with a timm encoder; models of the user's own
are in `own`. The encoder's own construction and weights are in `encoders`, heads in `heads`, the
place where saliency is taken in `representation`, batch statistics over workers in `batch_norm`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import SEGNET, ModelConfig
from repmtl_ray.data.columns import IMAGE, Inputs
from repmtl_ray.data.stream import Normalization
from repmtl_ray.models import segnet
from repmtl_ray.models.batch_norm import use_global_statistics
from repmtl_ray.models.encoders import build_encoder, has_fixed_size
from repmtl_ray.models.heads import HasHead, bottleneck, build_head
from repmtl_ray.models.representation import (
    allow_second_derivatives,
    blank_images,
    channel_axis,
    check_second_derivative,
    output_shape,
    second_derivatives_of_attention,
)


@final
class MultiTaskModel(nn.Module):
    """A shared encoder and a head for every task; build it with `build_model` or
    `own.build_own_model`.

    Args:
        encoder: images [rows, 3, H, W], or several inputs by name -> features: [rows, C, H', W'],
            [rows, C] or [rows, N, C].
        heads: by task.
        tasks: in the order of the predictions.

    Attributes:
        encoder, heads: as given, heads as a ModuleDict.
        representation: name of the module whose output saliency is taken at.
        representation_shape: of that output, without the rows, at the image size of the build.
        is_own: whether encoder and heads are the user's own.
        channel_axis: of that output with the rows; 1 for maps [rows, C, H, W] and pooled features,
            2 for tokens [rows, N, C], 3 for maps [rows, H, W, C] of networks that keep channels
            last.
    """

    def __init__(
        self, encoder: nn.Module, heads: Mapping[str, nn.Module], tasks: Sequence[HasHead]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(dict(heads))
        self._dense = {task.name: task.dense for task in tasks}
        self.representation = "encoder"
        self.representation_shape: tuple[int, ...] = ()
        self.channel_axis = 1
        self.is_own = False

    def forward(self, inputs: Inputs, rows: Mapping[str, slice] | None = None) -> dict[str, Tensor]:
        """Every task's prediction.

        Args:
            inputs: images [rows, 3, H, W], or what else the encoder takes.
            rows: by task, which rows it predicts for, as in `Batch`; None: all. Tasks that are not
                in it are left out.

        Returns:
            By task: [its rows, num_outputs, H, W] if dense, else [its rows, num_outputs].
        """
        with second_derivatives_of_attention() if self.is_own else contextlib.nullcontext():
            # Several inputs are the encoder's arguments by name.
            features = (
                self.encoder(**inputs) if isinstance(inputs, Mapping) else self.encoder(inputs)
            )
            size = _size_of(inputs)
            # An exported program has no `rows`, and would keep the number of rows of its example.
            num_rows = 0 if rows is None else _num_rows(inputs)
            return {
                task: self.predict(task, features, size)
                if rows is None or rows[task] == slice(0, num_rows)
                else self.predict(task, features[rows[task]], size)
                for task in self._dense
                if rows is None or task in rows
            }

    def predict(self, task: str, features: Tensor, image_size: tuple[int, int] | None) -> Tensor:
        """One task's prediction; dense ones are resized bilinearly with aligned corners.

        Args:
            task: name.
            features: the encoder's output, or the task's rows of it.
            image_size: (H, W) of the prediction; None without images.
        """
        output: Tensor = self.heads[task](features)
        if self._dense[task] and image_size is not None and output.shape[-2:] != image_size:
            output = functional.interpolate(output, image_size, mode="bilinear", align_corners=True)
        return output

    @property
    def num_encoder_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())


def _size_of(inputs: Inputs) -> tuple[int, int] | None:
    """(height, width) of the images among the inputs, if there are any."""
    images = inputs.get(IMAGE) if isinstance(inputs, Mapping) else inputs
    if images is None or images.ndim != 4:
        return None
    return images.shape[-2], images.shape[-1]


def _num_rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


def build_model(
    config: ModelConfig,
    tasks: Sequence[HasHead],
    *,
    image_size: tuple[int, int],
    workers: Workers = ALONE,
    penalized: bool = True,
    normalize: Normalization | None = None,
) -> MultiTaskModel:
    """The model of an experiment, in training mode; initial values depend on torch's seed alone.

    Args:
        config: see there.
        tasks: one head each.
        image_size: (height, width) that the model will see; encoders with position embeddings are
            built for it.
        workers: whose batches are one for batch normalisation, when `config.batch_norm` is
            "global".
        penalized: whether Rep-MTL's penalties are to be computed, which need second derivatives.
        normalize: what was done to the images, which were in 0..1 before; None: nothing.

    Raises:
        ValueError: an unknown encoder or one that cannot do what is asked, weights that do not fit
            or cannot be had, an unknown representation or one without channel axis or second
            derivative, a head that does not fit its task, or two tasks of one name.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks {', '.join(map(repr, names))}: names must differ.")
    encoder, heads = _parts(config, tasks, image_size)
    if config.input_scale == "symmetric":
        encoder.register_forward_pre_hook(partial(_to_symmetric, normalize))
    model = MultiTaskModel(encoder, heads, tasks)
    use_global_statistics(model, workers if config.batch_norm == "global" else ALONE)
    _set_representation(model, config, tasks, image_size)
    if penalized and config.representation != "encoder":
        check_second_derivative(model, config.representation, blank_images(model, image_size))
    return model


def _to_symmetric(
    normalize: Normalization | None, _encoder: nn.Module, inputs: tuple[Tensor]
) -> Tensor:
    """Images [rows, 3, H, W] in -1..1, from what the data make of images in 0..1."""
    (images,) = inputs
    if normalize is None:
        return 2 * images - 1
    mean, std = (images.new_tensor(values).reshape(3, 1, 1) for values in normalize)
    return 2 * (images * std + mean) - 1


def _parts(
    config: ModelConfig, tasks: Sequence[HasHead], image_size: tuple[int, int]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The encoder, and a head for every task."""
    if config.encoder == SEGNET:
        segnet.check_size(image_size)
        for task in tasks:
            if not task.dense:
                raise ValueError(
                    f"task {task.name!r} predicts no map, which encoder {SEGNET!r} is for."
                )
        return segnet.SegNetMTAN(len(tasks)), {
            task.name: segnet.MTANHead(index, task.num_outputs) for index, task in enumerate(tasks)
        }
    encoder, num_channels = build_encoder(config, image_size)
    if config.bottleneck is not None:
        encoder = nn.Sequential(
            OrderedDict(backbone=encoder, bottleneck=bottleneck(num_channels, config.bottleneck))
        )
        num_channels = config.bottleneck
    return encoder, {task.name: build_head(config, task, num_channels) for task in tasks}


def _set_representation(
    model: MultiTaskModel,
    config: ModelConfig,
    tasks: Sequence[HasHead],
    image_size: tuple[int, int],
) -> None:
    name = config.representation
    if name != "encoder":
        allow_second_derivatives(model.encoder)
    model.representation = name
    model.representation_shape = output_shape(model, name, blank_images(model, image_size))
    if name == "encoder":  # whose layout `build_encoder` promises
        model.channel_axis = 2 if config.features == "tokens" else 1
        return

    def other_shape() -> tuple[int, ...]:
        height, width = image_size
        if not has_fixed_size(config):  # one more at any stride
            return output_shape(model, name, blank_images(model, (height + 64, width + 64)))
        # A network of one image size: another one, with random weights that nobody sees.
        larger = (2 * height, 2 * width)
        plain = dataclasses.replace(config, pretrained=False, weights=None)
        with torch.random.fork_rng(devices=[]):
            encoder, heads = _parts(plain, tasks, larger)
        other = MultiTaskModel(encoder, heads, tasks)
        return output_shape(other, name, blank_images(other, larger))

    model.channel_axis = channel_axis(name, model.representation_shape, other_shape)
