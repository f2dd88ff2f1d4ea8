"""Tasks whose labels are classes: one for every pixel or one for every sample.

Owns `Segmentation` and `Classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn import functional

from repmtl_ray import metrics
from repmtl_ray.conversion import check
from repmtl_ray.data.columns import IGNORE_LABEL
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import MAX_CLASSES, Task, at_least_float32, directions


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
        logits = at_least_float32(prediction)
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
    """

    dense: ClassVar[bool] = False
    kind: ClassVar[Kind] = "class"
    metric_directions: ClassVar[Mapping[str, bool]] = directions("accuracy")

    @property
    def num_statistics(self) -> int:
        return metrics.NUM_ACCURACY_STATISTICS

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        return metrics.accuracy_statistics(prediction, target)

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        return metrics.accuracy_metrics(statistics)
