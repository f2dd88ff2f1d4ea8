"""Tasks whose labels are classes: one for every pixel or one for every sample.

Owns `Segmentation` and `Classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from repmtl_ray import metrics
from repmtl_ray.conversion import added, check, check_range
from repmtl_ray.data.columns import IGNORE_LABEL
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import MAX_CLASSES, Task, at_least_float32, directions

_MAX_WEIGHT = 1e6


@dataclass(frozen=True, kw_only=True)
class _ClassTask(Task):
    """Cross-entropy over labels that are not -1, the mean weighed by the classes' weights."""

    num_classes: int
    class_weights: tuple[float, ...] | None = added(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"task {self.name!r}: num_classes"
        check(self.num_classes >= 2, where, self.num_classes, "at least 2")
        check(self.num_classes <= MAX_CLASSES, where, self.num_classes, f"at most {MAX_CLASSES}")
        if self.class_weights is not None:
            where, weights = f"task {self.name!r}: class_weights", self.class_weights
            expected = f"{self.num_classes} numbers, one for each class"
            check(len(weights) == self.num_classes, where, weights, expected)
            for weight in weights:
                check_range(where, weight, 0, _MAX_WEIGHT)
            check(max(weights) > 0, where, weights, "a weight above 0")

    @property
    @final
    def num_outputs(self) -> int:
        return self.num_classes

    @final
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(prediction)
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        loss = functional.cross_entropy(
            logits,
            target,
            weights,
            ignore_index=IGNORE_LABEL,
            reduction="sum",
            label_smoothing=self._smoothing,
        )
        valid = target != IGNORE_LABEL
        if weights is None:
            return loss, valid.sum().to(loss.dtype)
        return loss, (weights[torch.where(valid, target, 0)] * valid).sum()

    @property
    def _smoothing(self) -> float:
        return 0.0


@final
@dataclass(frozen=True, kw_only=True)
class Segmentation(_ClassTask):
    """A class for every pixel.

    Args:
        num_classes: labels are 0 .. num_classes - 1, or -1 (ignored).
        class_weights: what a pixel of each class weighs in the loss, which is divided by the sum of
            the weights; None: all the same.
    """

    dense: ClassVar[bool] = True
    kind: ClassVar[Kind] = "label"
    metric_directions: ClassVar[Mapping[str, bool]] = directions("miou", "pixel_accuracy")

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
        class_weights: as for `Segmentation`.
        label_smoothing: the share of a label that is spread over all classes, in [0, 1).
        top_k: also report "top_k_accuracy", the share of images whose class is among the `top_k`
            most likely ones; None does not.
    """

    label_smoothing: float = added(0.0)
    top_k: int | None = added(None)

    dense: ClassVar[bool] = False
    kind: ClassVar[Kind] = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"task {self.name!r}: label_smoothing"
        is_right = 0 <= self.label_smoothing < 1
        check(is_right, where, self.label_smoothing, "a number in [0, 1)")
        is_right = self.top_k is None or 2 <= self.top_k < self.num_classes
        expected = f"2 to {self.num_classes - 1}, fewer than the classes, or None"
        check(is_right, f"task {self.name!r}: top_k", self.top_k, expected)

    @property
    def metric_directions(self) -> Mapping[str, bool]:  # type: ignore[override]
        return directions("accuracy", *(["top_k_accuracy"] if self.top_k else []))

    @property
    def _smoothing(self) -> float:
        return self.label_smoothing

    @property
    def num_statistics(self) -> int:
        return metrics.NUM_ACCURACY_STATISTICS + (self.top_k is not None)

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        return metrics.accuracy_statistics(prediction, target, self.top_k)

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.accuracy_metrics(statistics)
