"""Task heads: from the encoder's features to a task's raw outputs.

Owns the ASPP and the linear head. The model resizes dense outputs to the image. Activations are not
in place, because heads are differentiated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import ModelConfig
from repmtl_ray.models.batch_norm import GlobalBatchNorm


def _convolution(num_inputs: int, num_outputs: int, size: int, rate: int = 1) -> nn.Sequential:
    padding = rate * (size // 2)
    return nn.Sequential(
        nn.Conv2d(num_inputs, num_outputs, size, padding=padding, dilation=rate, bias=False),
        # Not BatchNorm2d: a pooled branch has one value per channel when the batch has one row.
        GlobalBatchNorm(nn.BatchNorm2d(num_outputs), ALONE),
        nn.ReLU(),
    )


@final
class ASPPHead(nn.Module):
    """DeepLabV3's head: parallel atrous convolutions and image pooling, then two convolutions.

    Called DeepLabV3+ in the papers, but there is no low-level skip.

    Args:
        num_channels: of the feature map.
        num_outputs: of the task.
        width: channels of every branch.
        rates: of the atrous 3x3 convolutions.
        dropout: after the branches are joined.
    """

    def __init__(
        self,
        num_channels: int,
        num_outputs: int,
        *,
        width: int,
        rates: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _convolution(num_channels, width, 1),
                *[_convolution(num_channels, width, 3, rate) for rate in rates],
            ]
        )
        self.pooled = _convolution(num_channels, width, 1)
        self.join = nn.Sequential(
            _convolution(width * (len(rates) + 2), width, 1), nn.Dropout(dropout)
        )
        self.output = nn.Sequential(_convolution(width, width, 3), nn.Conv2d(width, num_outputs, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[rows, num_channels, H', W'] -> [rows, num_outputs, H', W']."""
        pooled = self.pooled(features.mean(dim=(2, 3), keepdim=True))
        branches = [branch(features) for branch in self.branches]
        joined = torch.cat([*branches, pooled.expand_as(branches[0])], dim=1)
        return self.output(self.join(joined))


@final
class LinearMapHead(nn.Module):
    """A 1x1 convolution: [rows, C, H', W'] -> [rows, num_outputs, H', W']."""

    def __init__(self, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.output = nn.Conv2d(num_channels, num_outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(features)


@final
class LinearHead(nn.Module):
    """An affine map of the mean over positions.

    Maps are averaged over pixels, tokens over **all** tokens, class and register tokens included,
    so that every position of the representation has a saliency; pooled features are taken as they
    are.
    """

    def __init__(self, num_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(num_channels, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """[rows, C], [rows, C, H', W'] or [rows, N, C] -> [rows, num_outputs]."""
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        elif features.ndim == 3:
            features = features.mean(dim=1)
        return self.output(features)


def bottleneck(num_channels: int, width: int) -> nn.Sequential:
    """The layer that LibMTL's Office model has between its ResNet and the heads, shared by them.

    Args:
        num_channels: of the pooled features.
        width: units of the layer; 512 in LibMTL.

    Source:
        LibMTL, examples/office: Linear, BatchNorm1d, ReLU, Dropout(0.5), the weights normal with
        deviation 0.005 and the biases 0.1.
    """
    linear = nn.Linear(num_channels, width)
    nn.init.normal_(linear.weight, 0.0, 0.005)
    nn.init.constant_(linear.bias, 0.1)
    return nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5))


class HasHead(Protocol):
    """What a head is built from: a task, or the description of one that is stored with a model."""

    @property
    def name(self) -> str: ...

    @property
    def dense(self) -> bool: ...

    @property
    def num_outputs(self) -> int: ...


def build_head(config: ModelConfig, task: HasHead, num_channels: int) -> nn.Module:
    """The head that the configuration gives to a task.

    Args:
        config: `head`, `features` and, for ASPP, `head_channels`, `atrous_rates`, `dropout`.
        task: decides the number of outputs.
        num_channels: of the encoder's features.

    Raises:
        ValueError: a dense task without a feature map, or an ASPP head for a task that is not
            dense.
    """
    if task.dense and config.features != "map":
        raise ValueError(
            f"task {task.name!r} predicts maps: set model.features to 'map' "
            f"(it is {config.features!r})."
        )
    if config.head == "linear":
        return (LinearMapHead if task.dense else LinearHead)(num_channels, task.num_outputs)
    if not task.dense:
        raise ValueError(
            f"task {task.name!r} predicts no map: set model.head to 'linear' "
            f"(it is {config.head!r})."
        )
    return ASPPHead(
        num_channels,
        task.num_outputs,
        width=config.head_channels,
        rates=config.atrous_rates,
        dropout=config.dropout,
    )
