"""Tasks that measure every pixel: depth, inverse depth and surface normals.

Owns their losses; their statistics are in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from repmtl_ray import metrics
from repmtl_ray.conversion import added, check
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import Task, at_least_float32, directions

NORMAL_EPSILON = 1e-4
"""Predicted normals v are scaled by 1 / sqrt(|v|^2 + epsilon^2): no pole at zero, derivatives of
any order exist.
"""
_LEAST_DEPTH = 0.01
_USUAL_MEASURES = ("abs_error", "rel_error")
_DEPTH_MEASURES = (*_USUAL_MEASURES, "rmse", "delta_1", "delta_2", "delta_3")


@dataclass(frozen=True, kw_only=True)
class _DepthTask(Task):
    """L1 over measured pixels."""

    dense: ClassVar[bool] = True

    measures: tuple[str, ...] = added(_USUAL_MEASURES)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_right = bool(self.measures) and set(self.measures) <= set(_DEPTH_MEASURES)
        expected = f"some of {', '.join(_DEPTH_MEASURES)}"
        check(is_right, f"task {self.name!r}: measures", self.measures, expected)

    @property
    def metric_directions(self) -> Mapping[str, bool]:  # type: ignore[override]
        return directions(*self.measures)

    @property
    @final
    def num_outputs(self) -> int:
        return 1

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = at_least_float32(prediction)
        valid = metrics.valid_depth(target)
        measured = torch.where(valid, target, 0.0).to(prediction.dtype)
        loss = ((prediction - measured).abs() * valid).sum()
        return loss, valid.sum().to(loss.dtype)

    @property
    def _is_usual(self) -> bool:
        return set(self.measures) <= set(_USUAL_MEASURES)

    @property
    @final
    def num_statistics(self) -> int:
        return metrics.NUM_ERROR_STATISTICS if self._is_usual else metrics.NUM_DEPTH_STATISTICS

    @final
    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self._is_usual:
            return metrics.error_statistics(prediction, target)
        return metrics.depth_statistics(prediction, target)

    @final
    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        of_statistics = metrics.error_metrics if self._is_usual else metrics.depth_metrics
        found = of_statistics(statistics)
        return {name: found[name] for name in self.measures if name in found}


@final
@dataclass(frozen=True, kw_only=True)
class Depth(_DepthTask):
    """Metres for every pixel; 0 where not measured.

    Args:
        loss: "l1", the mean over pixels; or "silog", the scale-invariant logarithmic loss: of every
            image mean(d^2) - mean(d)^2 / 2 with d = log(predicted) - log(measured), and the mean
            over images. Below 1 cm the logarithm goes on as its tangent.
        measures: metrics to report: "abs_error", "rel_error", "rmse", and "delta_1", "delta_2",
            "delta_3" (the percentage of pixels whose ratio is below 1.25, 1.25^2, 1.25^3).

    Source:
        Eigen, Puhrsch, Fergus, arXiv:1406.2283, equation 4 (lambda 0.5) and section 4.3.
    """

    loss: Literal["l1", "silog"] = added("l1")

    kind: ClassVar[Kind] = "depth"

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.loss == "l1":
            return super().loss_sum(prediction, target)
        prediction = at_least_float32(prediction)
        valid = metrics.valid_depth(target)
        measured = torch.where(valid, target, 1.0).to(prediction.dtype).log()
        difference = ((_extended_log(prediction) - measured) * valid).flatten(1)
        number = valid.flatten(1).sum(dim=1).to(difference.dtype)
        count = number.clamp_min(1)
        of_image = difference.square().sum(dim=1) / count
        of_image = of_image - 0.5 * (difference.sum(dim=1) / count).square()
        return of_image.sum(), (number > 0).sum().to(of_image.dtype)


def _extended_log(depth: Tensor) -> Tensor:
    """The logarithm, and below `_LEAST_DEPTH` its tangent: a head may predict what is not positive."""
    above = depth.clamp_min(_LEAST_DEPTH)
    return above.log() + (depth - above) / _LEAST_DEPTH


@final
@dataclass(frozen=True, kw_only=True)
class InverseDepth(_DepthTask):
    """Inverse depth for every pixel; 0 where not measured.

    Its errors are of inverse depth, as in the published tables. A kind of its own because
    augmentation scales it the other way round.

    Args:
        measures: as for `Depth`.
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
