"""Tasks that measure every pixel: depth, inverse depth and surface normals.

Owns their losses; their statistics are in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from repmtl_ray import metrics
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import Task, at_least_float32, directions

NORMAL_EPSILON = 1e-4
"""Predicted normals v are scaled by 1 / sqrt(|v|^2 + epsilon^2): no pole at zero, derivatives of
any order exist.
"""


@dataclass(frozen=True, kw_only=True)
class _DepthTask(Task):
    """L1 over measured pixels."""

    dense: ClassVar[bool] = True
    metric_directions: ClassVar[Mapping[str, bool]] = directions("abs_error", "rel_error")

    @property
    @final
    def num_outputs(self) -> int:
        return 1

    @final
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = at_least_float32(prediction)
        valid = metrics.valid_depth(target)
        measured = torch.where(valid, target, 0.0).to(prediction.dtype)
        loss = ((prediction - measured).abs() * valid).sum()
        return loss, valid.sum().to(loss.dtype)

    @property
    @final
    def num_statistics(self) -> int:
        return metrics.NUM_ERROR_STATISTICS

    @final
    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        return metrics.error_statistics(prediction, target)

    @final
    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.error_metrics(statistics)


@final
@dataclass(frozen=True, kw_only=True)
class Depth(_DepthTask):
    """Metres for every pixel; 0 where not measured."""

    kind: ClassVar[Kind] = "depth"


@final
@dataclass(frozen=True, kw_only=True)
class InverseDepth(_DepthTask):
    """Inverse depth for every pixel; 0 where not measured.

    Its errors are of inverse depth, as in the published tables. A kind of its own because
    augmentation scales it the other way round.
    """

    kind: ClassVar[Kind] = "inverse_depth"


@final
@dataclass(frozen=True, kw_only=True)
class Normals(Task):
    """A surface normal for every pixel; the loss is 1 - cosine, over pixels whose true normal is
    not zero.
    """

    dense: ClassVar[bool] = True
    kind: ClassVar[Kind] = "normal"
    metric_directions: ClassVar[Mapping[str, bool]] = directions(
        "mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"
    )

    @property
    def num_outputs(self) -> int:
        return 3

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = at_least_float32(prediction)
        valid = metrics.valid_normal(target)
        inverse_length = (prediction.square().sum(dim=1) + NORMAL_EPSILON**2).rsqrt()
        cosine = (prediction * target.to(prediction.dtype)).sum(dim=1) * inverse_length
        loss = ((1 - cosine) * valid).sum()
        return loss, valid.sum().to(loss.dtype)

    @property
    def num_statistics(self) -> int:
        return metrics.NUM_ANGLE_STATISTICS

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        return metrics.angle_statistics(prediction, target)

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.angle_metrics(statistics)
