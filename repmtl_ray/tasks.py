"""What a task is: its name, the width of its head, its loss over valid labels and its metrics.

Owns the task classes and their losses. The additive statistics behind the metrics are in `metrics`.
A task returns the sum of its loss and the number of its labels; the caller makes one mean of those
of all workers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from repmtl_ray import metrics
from repmtl_ray.conversion import check, check_types
from repmtl_ray.data.columns import IGNORE_LABEL
from repmtl_ray.data.stream import Kind

MAX_CLASSES = 65_536
NORMAL_EPSILON = 1e-4
"""Predicted normals v are scaled by 1 / sqrt(|v|^2 + epsilon^2): no pole at zero, derivatives of
any order exist.
"""


def _directions(*names: str) -> Mapping[str, bool]:
    return {name: metrics.HIGHER_IS_BETTER[name] for name in names}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One thing to predict from an image.

    Args:
        name: prefix of its metrics ("depth" in "depth/abs_error") and name of its head.
    """

    name: str

    dense: ClassVar[bool]
    """Predicts a map [rows, num_outputs, H, W] at image size; otherwise a vector [rows,
    num_outputs].
    """
    kind: ClassVar[Kind]
    """What the task's column holds."""
    metric_directions: ClassVar[Mapping[str, bool]]
    """By metric: whether higher is better."""

    def __post_init__(self) -> None:
        check(isinstance(self.name, str), "task name", self.name, "a string")
        if type(self).__module__ == __name__:
            check_types(self, f"task {self.name!r}")
        if not self.name.isidentifier():
            raise ValueError(
                f"task name {self.name!r}: expected letters, digits, underscores; no digit first."
            )

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """The width of the head."""

    @abstractmethod
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over this worker's valid labels, and the number of these labels.

        It is computed in float32 at least, whatever the prediction's dtype, and is twice
        differentiable. Without any valid label it is a zero that is still connected to the
        prediction. It does not branch on values, so that all workers make the same calls and no
        device waits for the host.

        Args:
            prediction: [rows, num_outputs, H, W] if dense, else [rows, num_outputs].
            target: as in `repmtl_ray.data.columns.Batch`.

        Returns:
            Two scalars of the same dtype. The mean is the first, summed over workers, divided by
            the second, summed over workers.
        """

    @property
    @abstractmethod
    def num_statistics(self) -> int:
        """The length of `statistics`; zeros of this length are the statistics of no sample."""

    @abstractmethod
    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Flat float64 sums, from whose total over batches and workers the metrics are computed.

        Args:
            prediction, target: as for `loss_sum`.
        """

    @abstractmethod
    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        """The metrics that have a valid label."""

    @final
    def metrics(self, statistics: Tensor) -> dict[str, float]:
        """The metrics by name: one for each of `metric_directions`, all finite.

        Args:
            statistics: the total of what `statistics` returned.

        Raises:
            ValueError: a metric without any valid label, or one that is not finite.
        """
        values = self._metrics(statistics)
        for name in self.metric_directions:
            if name not in values:
                raise ValueError(
                    f"task {self.name!r}: {name} has no valid label in the split; "
                    "check its targets or drop the task."
                )
            if not math.isfinite(values[name]):
                raise ValueError(
                    f"task {self.name!r}: {name} is {values[name]}; "
                    "the model's predictions are not finite."
                )
        return values


@dataclass(frozen=True, kw_only=True)
class _ClassTask(Task):
    """Cross-entropy over labels that are not -1."""

    num_classes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"task {self.name!r}: num_classes"
        check(self.num_classes >= 2, where, self.num_classes, "at least 2")
        check(self.num_classes <= MAX_CLASSES, where, self.num_classes, f"at most {MAX_CLASSES}")

    @property
    @final
    def num_outputs(self) -> int:
        return self.num_classes

    @final
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = _at_least_float32(prediction)
        loss = functional.cross_entropy(logits, target, ignore_index=IGNORE_LABEL, reduction="sum")
        return loss, (target != IGNORE_LABEL).sum().to(loss.dtype)


@final
@dataclass(frozen=True, kw_only=True)
class Segmentation(_ClassTask):
    """A class for every pixel.

    Args:
        num_classes: labels are 0 .. num_classes - 1, or -1 (ignored).
    """

    dense: ClassVar[bool] = True
    kind: ClassVar[Kind] = "label"
    metric_directions: ClassVar[Mapping[str, bool]] = _directions("miou", "pixel_accuracy")

    @property
    def num_statistics(self) -> int:
        return self.num_classes**2

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        try:
            return metrics.confusion_statistics(prediction, target)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.confusion_metrics(statistics)


@final
@dataclass(frozen=True, kw_only=True)
class Classification(_ClassTask):
    """A class for every image.

    Args:
        num_classes: labels are 0 .. num_classes - 1, or -1 (ignored).
    """

    dense: ClassVar[bool] = False
    kind: ClassVar[Kind] = "class"
    metric_directions: ClassVar[Mapping[str, bool]] = _directions("accuracy")

    @property
    def num_statistics(self) -> int:
        return metrics.NUM_ACCURACY_STATISTICS

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        return metrics.accuracy_statistics(prediction, target)

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.accuracy_metrics(statistics)


@dataclass(frozen=True, kw_only=True)
class _DepthTask(Task):
    """L1 over measured pixels."""

    dense: ClassVar[bool] = True
    metric_directions: ClassVar[Mapping[str, bool]] = _directions("abs_error", "rel_error")

    @property
    @final
    def num_outputs(self) -> int:
        return 1

    @final
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = _at_least_float32(prediction)
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
    metric_directions: ClassVar[Mapping[str, bool]] = _directions(
        "mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"
    )

    @property
    def num_outputs(self) -> int:
        return 3

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction = _at_least_float32(prediction)
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


TASK_CLASSES: tuple[type[Task], ...] = (
    Segmentation,
    Classification,
    Depth,
    InverseDepth,
    Normals,
)
"""The tasks of this project; a stored model names them."""
