"""Tasks with numbers or yes-or-no answers for every sample: `Regression`, `Binary`, `MultiLabel`.

Owns their losses and metrics. A regression target that is not known is NaN, a binary one -1; no
loss and no metric reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from repmtl_ray.conversion import check, check_range
from repmtl_ray.data.columns import IGNORE_LABEL
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import MAX_CLASSES, Task, at_least_float32, directions
from repmtl_ray.tasks.ranking import ranking_metrics

_MAX_WEIGHT = 1e6
_BINARY_METRICS = ("auc", "average_precision", "f1", "accuracy")


@final
@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """One number or several for every sample; a value that is not known is NaN.

    The loss is the mean over known values. The metrics are the mean absolute error and the root of
    the mean squared error, over all known values of the split.

    Args:
        num_values: how many numbers a sample has; its column holds a float, or [num_values] floats.
        loss: "l1" |e|; "l2" e^2; "huber" e^2 / 2 up to `delta`, and delta (|e| - delta / 2) above.
        delta: of the Huber loss, in the unit of the values.
    """

    num_values: int = 1
    loss: Literal["l1", "l2", "huber"] = "l1"
    delta: float = 1.0

    dense: ClassVar[bool] = False
    kind: ClassVar[Kind] = "value"
    metric_directions: ClassVar[Mapping[str, bool]] = directions("abs_error", "rmse")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(f"task {self.name!r}: num_values", self.num_values, 1, MAX_CLASSES)
        check_range(f"task {self.name!r}: delta", self.delta, 0, _MAX_WEIGHT, above=True)

    @property
    def num_outputs(self) -> int:
        return self.num_values

    @property
    def num_targets(self) -> int:
        return self.num_values

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        error, valid = _errors(at_least_float32(prediction), target)
        if self.loss == "l2":
            loss = error.square()
        elif self.loss == "huber":
            loss = functional.huber_loss(
                error, torch.zeros_like(error), delta=self.delta, reduction="none"
            )
        else:
            loss = error.abs()
        return loss.sum(), valid.sum().to(loss.dtype)

    @property
    def num_statistics(self) -> int:
        return 3

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        error, valid = _errors(prediction.double(), target.double())
        return torch.stack([error.abs().sum(), error.square().sum(), valid.sum().double()])

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        absolute, squared, count = statistics.tolist()
        if not count:
            return {}
        return {"abs_error": absolute / count, "rmse": (squared / count) ** 0.5}


def _errors(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction minus target, 0 where the target is not known; and where it is known."""
    target = target.reshape(prediction.shape)
    valid = torch.isfinite(target)
    known = torch.where(valid, target, 0.0).to(prediction.dtype)
    return (prediction - known) * valid, valid


@dataclass(frozen=True, kw_only=True)
class _YesOrNo(Task):
    """Binary cross-entropy over known labels, which are 0 or 1; the head gives logits."""

    dense: ClassVar[bool] = False
    kind: ClassVar[Kind] = "binary"
    num_columns: ClassVar[int] = 3
    without_metric: ClassVar[str] = (
        "has no valid label in the split, or only labels of one kind: f1 needs a 1, auc and average_precision a 1 and a 0. "
        "Choose samples that have them, or other `measures` ('accuracy' needs neither)."
    )

    measures: tuple[str, ...] = ("auc", "average_precision")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_right = bool(self.measures) and set(self.measures) <= set(_BINARY_METRICS)
        expected = f"some of {', '.join(_BINARY_METRICS)}"
        check(is_right, f"task {self.name!r}: measures", self.measures, expected)
        for weight in self._pos_weights:
            where = f"task {self.name!r}: pos_weight"
            check_range(where, weight, 0, _MAX_WEIGHT, above=True)

    @property
    @final
    def num_targets(self) -> int:
        return self.num_outputs

    @property
    def _pos_weights(self) -> tuple[float, ...]:
        raise NotImplementedError

    @property
    def metric_directions(self) -> Mapping[str, bool]:  # type: ignore[override]
        return directions(*self.measures)

    @final
    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(prediction)
        target = target.reshape(logits.shape)
        valid = target != IGNORE_LABEL
        loss = functional.binary_cross_entropy_with_logits(
            logits,
            torch.where(valid, target, 0).to(logits.dtype),
            pos_weight=logits.new_tensor(self._pos_weights),
            reduction="none",
        )
        return (loss * valid).sum(), valid.sum().to(loss.dtype)

    @property
    @final
    def num_statistics(self) -> int:
        return 4 * self.num_outputs

    @final
    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        """By label: true positives, false positives, false negatives, true negatives."""
        target = target.reshape(prediction.shape)
        predicted, is_one, is_zero = prediction > 0, target == 1, target == 0
        counts = [predicted & is_one, predicted & is_zero, ~predicted & is_one]
        counts.append(~predicted & is_zero)
        return torch.stack([count.sum(dim=0) for count in counts], dim=1).flatten().double()

    @final
    def collected(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Number of the label, score and label of every known label."""
        target = target.reshape(prediction.shape)
        valid = target != IGNORE_LABEL
        number = torch.arange(self.num_outputs, device=target.device).expand_as(target)
        columns = [number[valid].double(), prediction[valid].double(), target[valid].double()]
        return torch.stack(columns, dim=1)

    @final
    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        f1, accuracy = [], []
        for true, wrong, missed, rest in statistics.reshape(-1, 4).tolist():
            if true + missed:  # without a 1 there is nothing to find
                f1.append(100 * 2 * true / (2 * true + wrong + missed))
            if true + wrong + missed + rest:
                accuracy.append(100 * (true + rest) / (true + wrong + missed + rest))
        found = {"f1": f1, "accuracy": accuracy}
        return {n: fmean(found[n]) for n in self.measures if found.get(n)}

    @final
    def _collected_metrics(self, collected: Tensor) -> dict[str, float]:
        by_label = [collected[collected[:, 0] == k] for k in range(self.num_outputs)]
        found = [ranking_metrics(rows[:, 1], rows[:, 2]) for rows in by_label]
        return {
            name: fmean(of_label[name] for of_label in found if of_label)
            for name in ("auc", "average_precision")
            if name in self.measures and any(found)
        }


@final
@dataclass(frozen=True, kw_only=True)
class Binary(_YesOrNo):
    """Yes or no for every sample: 1 or 0, or -1 where it is not known.

    Args:
        pos_weight: what a 1 weighs in the loss, against 1 for a 0.
        measures: metrics to report, in percent: "auc" (area under the ROC curve),
            "average_precision", "f1" and "accuracy" (both at a probability of one half).
    """

    pos_weight: float = 1.0

    @property
    def _pos_weights(self) -> tuple[float, ...]:
        return (self.pos_weight,)

    @property
    def num_outputs(self) -> int:
        return 1


@final
@dataclass(frozen=True, kw_only=True)
class MultiLabel(_YesOrNo):
    """Several yes-or-no answers for every sample; its column holds [num_labels] of 0, 1 or -1.

    Metrics are means over labels; a label of which the split lacks the ones (or, for the area and
    the average precision, the zeros) is left out of the mean.

    Args:
        num_labels: how many.
        pos_weight: as for `Binary`; one for all labels, or one for each.
        measures: as for `Binary`.
    """

    num_labels: int
    pos_weight: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if isinstance(self.pos_weight, int | float):
            check_range(
                f"task {self.name!r}: pos_weight", self.pos_weight, 0, _MAX_WEIGHT, above=True
            )
            object.__setattr__(self, "pos_weight", (float(self.pos_weight),))
        super().__post_init__()
        check_range(f"task {self.name!r}: num_labels", self.num_labels, 1, MAX_CLASSES)
        is_right = len(self.pos_weight) in (1, self.num_labels)
        expected = f"one number, or {self.num_labels}"
        check(is_right, f"task {self.name!r}: pos_weight", self.pos_weight, expected)

    @property
    def _pos_weights(self) -> tuple[float, ...]:
        return self.pos_weight

    @property
    def num_outputs(self) -> int:
        return self.num_labels


def check_answers(task: Task, answers: NDArray[np.bool_]) -> None:
    """Refuses a split whose labels do not allow a metric of a yes-or-no task, before it is evaluated.

    Args:
        task: of any class; those of other classes are passed over.
        answers: [labels, 2], whether the split has a 0, and whether it has a 1.

    Raises:
        ValueError: as `Task.metrics`.
    """
    if not isinstance(task, _YesOrNo):
        return
    labels, values = map(torch.from_numpy, np.nonzero(answers))
    target = torch.full((len(labels), task.num_outputs), IGNORE_LABEL)
    target[torch.arange(len(labels)), labels] = values
    prediction = torch.zeros(target.shape)
    task.metrics(task.statistics(prediction, target), task.collected(prediction, target))
