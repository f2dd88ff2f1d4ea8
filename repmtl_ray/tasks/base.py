"""What a task is: its name, the width of its head, its loss over valid labels and its metrics.

Owns the base of all task classes. A task returns the sum of its loss and the number of its labels;
the caller makes one mean of those of all workers. Metrics are computed from statistics that add up
over batches and workers, and from rows that are collected where a metric orders samples (AUC).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from repmtl_ray import metrics
from repmtl_ray.conversion import check, check_types
from repmtl_ray.data.stream import Kind

MAX_CLASSES = 65_536
OWN_MODULES = "repmtl_ray.tasks"


def directions(*names: str) -> Mapping[str, bool]:
    """Whether higher is better, by the name of a metric of this project."""
    return {name: metrics.HIGHER_IS_BETTER[name] for name in names}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def is_of_project(task: Task) -> bool:
    """Whether a task's class is this project's, and not the user's own."""
    return type(task).__module__.startswith(OWN_MODULES)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One thing to predict from a sample.

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
        if is_of_project(self) and not self.code_fields:
            check_types(self, f"task {self.name!r}")
        if not self.name.isidentifier():
            raise ValueError(
                f"task name {self.name!r}: expected letters, digits, underscores; no digit first."
            )

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """The width of the head."""

    @property
    def num_targets(self) -> int | None:
        """How many numbers the label of a sample has; None if that is not for the task to say."""
        return None

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

    num_columns: ClassVar[int] = 0
    """The width of `collected`; 0 if no metric needs single samples."""
    without_metric: ClassVar[str] = (
        "has no valid label in the split; check its targets or drop the task."
    )
    """What to say where the labels of a split do not allow a metric."""
    code_fields: ClassVar[tuple[str, ...]] = ()
    """The fields that hold code of the user's own, which no file keeps; its identity is stored."""

    def collected(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What metrics must know of every single label, because no sum says it.

        The rows of all batches and workers are put together in any order, so metrics must not
        depend on it.

        Args:
            prediction, target: as for `loss_sum`.

        Returns:
            [any number, num_columns] float64.
        """
        return prediction.new_zeros(0, self.num_columns, dtype=torch.float64)

    def _collected_metrics(self, collected: Tensor) -> dict[str, float]:
        """The metrics of [any number, num_columns] rows that have a valid label."""
        return {}

    @final
    def metrics(self, statistics: Tensor, collected: Tensor | None = None) -> dict[str, float]:
        """The metrics by name: one for each of `metric_directions`, all finite.

        Args:
            statistics: the total of what `statistics` returned.
            collected: all rows of what `collected` returned; not needed if `num_columns` is 0.

        Raises:
            ValueError: a metric without any valid label, or one that is not finite.
        """
        values = self._metrics(statistics)
        if collected is not None:
            values |= self._collected_metrics(collected)
        for name in self.metric_directions:
            if name not in values:
                raise ValueError(f"task {self.name!r}: {name} {self.without_metric}")
            if not math.isfinite(values[name]):
                raise ValueError(
                    f"task {self.name!r}: {name} is {values[name]}; "
                    "the model's predictions are not finite."
                )
        return values
