"""A task with a loss and metrics of the user's own, and what is checked of both before training.

Owns `CustomTask`. Metrics are the same however the samples of a split are spread over batches and
workers: means of values by sample are sums, and metrics of torchmetrics see all samples of the split
at once. Maps are too large to be collected; of them, torchmetrics' states that are sums are added.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, Union, cast, final, get_args

import torch
from torch import Tensor

from repmtl_ray import metrics
from repmtl_ray.conversion import check, check_range, shown
from repmtl_ray.data.columns import IGNORE_LABEL
from repmtl_ray.data.stream import Kind
from repmtl_ray.tasks.base import MAX_CLASSES, Task, at_least_float32
from repmtl_ray.user_code import failure_of, is_message

Loss: TypeAlias = Callable[[Tensor, Tensor], Union[Tensor, "tuple[Tensor, Tensor]"]]
"""From predictions and labels to one loss a sample, or to the sum and the number of labels."""
_MAPS: tuple[Kind, ...] = ("label", "depth", "inverse_depth", "normal")
_INTEGERS: tuple[Kind, ...] = ("label", "class", "binary")
_KINDS = tuple(kind for kind in get_args(Kind) if kind not in ("image", "input"))


@final
@dataclass(frozen=True, kw_only=True)
class CustomTask(Task):
    """A task with a loss and metrics of your own.

    Loss and metrics get samples that have a label, and no others. Predictions are [rows,
    num_outputs] (with one output [rows]), or, of maps, [rows, num_outputs, H, W]. Labels are as in
    `repmtl_ray.data.columns.Batch`. Where a sample knows only a part of its label, the rest is -1,
    NaN or 0.

    Args:
        kind: what its column holds (`repmtl_ray.data.stream.Kind`); "label", "depth",
            "inverse_depth" and "normal" are maps.
        num_outputs: the width of its head.
        num_targets: of the kinds "value" and "binary", how many numbers a label has.
        num_classes: of the kinds "class" and "label"; other labels are refused. None: any number.
        loss: from predictions and labels to one loss a sample, [rows]; or to two scalars, the sum of
            the loss and the number of labels that it is over. It gets float32 at least. Rep-MTL's
            penalties differentiate it twice.
        measures: its metrics by name, at least one. Either a function from predictions and labels to one value a
            sample, [rows], of which the metric is the mean; or a metric of torchmetrics. A name that
            `repmtl_ray.metrics` does not know ends in "_up" where more is better, else in "_down".
        predict: from the head's output to the predictions that metrics get, for example
            `torch.sigmoid`; None: the output itself.
    """

    kind: Kind = "value"  # type: ignore[misc]
    num_outputs: int = 1
    num_targets: int = 1
    num_classes: int | None = None
    loss: Loss
    measures: Mapping[str, Any]
    predict: Callable[[Tensor], Tensor] | None = None

    code_fields: ClassVar[tuple[str, ...]] = ("loss", "measures", "predict")

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"task {self.name!r}"
        check(self.kind in _KINDS, f"{where}: kind", self.kind, "one of " + ", ".join(_KINDS))
        for name in ("num_outputs", "num_targets", "num_classes"):
            number = getattr(self, name)
            if number is None and name == "num_classes":
                continue
            check(type(number) is int, f"{where}: {name}", number, "an integer")
            check_range(f"{where}: {name}", number, 1, MAX_CLASSES)
        usual: dict[str, int | None]
        usual = {"num_targets": 1} if self.kind not in ("value", "binary") else {}
        usual |= {} if self.kind in ("label", "class") else {"num_classes": None}
        for name, value in usual.items():
            given = getattr(self, name)
            check(given == value, f"{where}: {name}", given, f"nothing with kind {self.kind!r}")
        check(
            callable(self.loss), f"{where}: loss", self.loss, "a function of predictions and labels"
        )
        is_right = self.predict is None or callable(self.predict)
        check(
            is_right, f"{where}: predict", self.predict, "a function of the head's output, or None"
        )
        is_right = isinstance(self.measures, Mapping) and bool(self.measures)
        expected = "metrics by name, at least one, for example {'ndcg': metric}"
        check(is_right, f"{where}: measures", self.measures, expected)
        for name, measure in self.measures.items():
            self._check_measure(name, measure)
        copies = {
            name: _unused(measure) if _is_of_torchmetrics(measure) else measure
            for name, measure in self.measures.items()
        }
        object.__setattr__(self, "measures", copies)

    def _check_measure(self, name: Any, measure: Any) -> None:
        where = f"task {self.name!r}: measures[{name!r}]"
        check(isinstance(name, str), where, name, "a name that is a string")
        is_up = metrics.higher_is_better(name)
        if is_up is None:
            raise ValueError(
                f"{where}: the name does not say whether more is better; end it in '_up' or in "
                "'_down', or take a name that repmtl_ray.metrics knows."
            )
        if not _is_of_torchmetrics(measure):
            expected = "a function of predictions and labels, or one metric of torchmetrics"
            is_right = callable(measure) and not hasattr(measure, "compute")
            check(is_right and not isinstance(measure, type), where, measure, expected)
            return
        if measure.higher_is_better is not None and measure.higher_is_better is not is_up:
            raise ValueError(
                f"{where}: {type(measure).__name__} says that "
                f"{'more' if measure.higher_is_better else 'less'} is better, and the name says the "
                "opposite; choose another name."
            )
        unmerged = _not_sums(measure) if self.dense else []
        if unmerged:
            raise ValueError(
                f"{where}: {type(measure).__name__} cannot be merged over workers: its "
                f"{', '.join(unmerged)} {'are' if len(unmerged) > 1 else 'is'} no sum, and maps are "
                "too large to be collected. Take a metric whose states are sums (for example one "
                "with `thresholds`), or a function that gives one value a sample."
            )

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return self.kind in _MAPS

    @property
    def metric_directions(self) -> Mapping[str, bool]:  # type: ignore[override]
        return {name: metrics.higher_is_better(name) is True for name in self.measures}

    def loss_sum(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        prediction, target = self._labelled(at_least_float32(prediction), target)
        if not len(target):  # a zero that is still connected to the prediction
            zero = (prediction * 0).sum()
            return zero, zero.detach()
        result = self.loss(prediction, target)
        if isinstance(result, tuple) and len(result) == 2:
            loss, count = (torch.as_tensor(part, device=prediction.device) for part in result)
            if loss.shape == count.shape == ():
                return loss, count.detach().to(loss.dtype)
            shapes = f"two tensors of the shapes {tuple(loss.shape)} and {tuple(count.shape)}"
        elif isinstance(result, Tensor):
            if result.shape == (len(target),):
                return result.sum(), result.new_tensor(len(target))
            shapes = "a scalar" if result.ndim == 0 else f"a tensor of shape {tuple(result.shape)}"
        else:
            shapes = f"a {type(result).__name__}"
        raise ValueError(
            f"task {self.name!r}: the loss of {len(target)} samples is {shapes}; expected one loss a "
            f"sample, [{len(target)}] (reduction='none'), or the sum and the number of labels, two "
            "scalars. Means of two workers cannot be merged."
        )

    @property
    def num_statistics(self) -> int:
        return sum(self._sizes.values())

    @property
    def _sizes(self) -> dict[str, int]:
        """By metric that is in sums, how many numbers it has: a sum and a count, or its states and
        the number of samples."""
        sizes = {}
        for name, measure in self.measures.items():
            if not _is_of_torchmetrics(measure):
                sizes[name] = 2
            elif self.dense:
                sizes[name] = sum(default.numel() for default in measure._defaults.values()) + 1
        return sizes

    def statistics(self, prediction: Tensor, target: Tensor) -> Tensor:
        prediction, target = self._labelled(at_least_float32(prediction), target)
        if not len(target):
            return prediction.new_zeros(self.num_statistics, dtype=torch.float64)
        predicted = self._predicted(prediction)
        parts = [prediction.new_zeros(0, dtype=torch.float64)]
        for name in self._sizes:
            measure = self.measures[name]
            if _is_of_torchmetrics(measure):
                updated = _updated(measure, predicted, target)
                parts += [getattr(updated, state).flatten().double() for state in updated._defaults]
            else:
                parts.append(self._values(name, predicted, target).double().sum().reshape(1))
            parts.append(predicted.new_tensor([len(target)], dtype=torch.float64))
        return torch.cat([part.to(prediction.device) for part in parts])

    @property
    def num_columns(self) -> int:  # type: ignore[override]
        is_collected = not self.dense and any(map(_is_of_torchmetrics, self.measures.values()))
        return self.num_outputs + self.num_targets if is_collected else 0

    def collected(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The head's outputs and the label of every sample that has one."""
        prediction, target = self._labelled(prediction, target)
        outputs = prediction.reshape(len(target), self.num_outputs).double()
        return torch.cat([outputs, target.reshape(len(target), self.num_targets).double()], dim=1)

    def _metrics(self, statistics: Tensor) -> dict[str, float]:
        values = {}
        parts = statistics.split(list(self._sizes.values()))
        for name, part in zip(self._sizes, parts, strict=True):
            measure, count = self.measures[name], float(part[-1])
            if count and _is_of_torchmetrics(measure):
                values[name] = self._number(name, _with_sums(measure, part[:-1]).compute())
            elif count:
                values[name] = float(part[0]) / count
        return values

    def _collected_metrics(self, collected: Tensor) -> dict[str, float]:
        updated = self.updated_with(collected) if len(collected) else {}
        return {name: self._number(name, measure.compute()) for name, measure in updated.items()}

    def updated_with(self, collected: Tensor) -> dict[str, Any]:
        """The metrics of torchmetrics, each with all samples in it, before they are computed: of few
        samples they may not exist."""
        output, label = collected.split([self.num_outputs, self.num_targets], dim=1)
        label = label.long() if self.kind in _INTEGERS else label
        label = label[:, 0] if self.num_targets == 1 else label
        predicted = self._predicted(output[:, 0] if self.num_outputs == 1 else output)
        return {
            name: _updated(measure, predicted, label)
            for name, measure in self.measures.items()
            if _is_of_torchmetrics(measure)
        }

    def check_computed(self, updated: Mapping[str, Any]) -> None:
        """Refuses a metric that is several numbers, or none, as soon as a few samples show it."""
        for name, measure in updated.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of too few samples
                    value = measure.compute()
            except (TypeError, RuntimeError, LookupError, ValueError, ArithmeticError):
                continue  # of so few samples it does not exist
            self._number(name, value)

    def _labelled(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The samples that have a label; single numbers without their axis."""
        if self.kind in _INTEGERS:
            is_known = target != IGNORE_LABEL
        elif self.kind == "value":
            is_known = torch.isfinite(target)
        else:
            is_known = target != 0
        rows = is_known.reshape(len(target), math.prod(target.shape[1:])).any(dim=1)
        prediction, target = prediction[rows], target[rows]
        if not self.dense and self.num_outputs == 1:
            prediction = prediction[:, 0]
        if not self.dense and self.num_targets == 1:
            target = target.reshape(len(target))
        return prediction, target

    def _predicted(self, output: Tensor) -> Tensor:
        return output if self.predict is None else self.predict(output)

    def _values(self, name: str, predicted: Tensor, target: Tensor) -> Tensor:
        values = self.measures[name](predicted, target)
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        expected = f"one value a sample, [{len(target)}], of which the metric is the mean"
        is_right = isinstance(values, Tensor) and values.shape == (len(target),)
        check(is_right, f"task {self.name!r}: measures[{name!r}] of samples", shape, expected)
        return cast(Tensor, values)

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(
                f"task {self.name!r}: measures[{name!r}] of the split is {found}; expected one "
                "number, for example with average='macro'."
            )
        return float(value)


def check_on(task: Task, prediction: Tensor, target: Tensor, *, penalized: bool) -> None:
    """Whether code of the user's own gives a loss that can be trained and metrics that can be merged.

    Args:
        task: with code of the user's own.
        prediction, target: of some samples, as for `Task.loss_sum`.
        penalized: whether the loss is differentiated twice.

    Raises:
        ValueError: names the task, says what was found and what to do.
    """
    prediction = prediction.detach().requires_grad_()
    shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
    try:
        pair = task.loss_sum(prediction, target)
        task.statistics(prediction.detach(), target)
        collected = task.collected(prediction.detach(), target) if task.num_columns else None
        if isinstance(task, CustomTask) and collected is not None and len(collected):
            task.check_computed(task.updated_with(collected))
    except Exception as error:  # whatever the user's functions raise
        if is_message(error):
            raise
        raise ValueError(
            f"task {task.name!r}: its loss or a metric cannot be computed from a prediction and a "
            f"target of the shapes {shapes}: {failure_of(error)}."
        ) from error
    is_pair = isinstance(pair, tuple) and len(pair) == 2
    is_pair = is_pair and all(isinstance(part, Tensor) and part.ndim == 0 for part in pair)
    check(is_pair, f"task {task.name!r}: loss_sum(...)", pair, "two scalars, a sum and a count")
    loss, count = pair
    if not float(count):
        return
    value = float(loss.detach())
    if not math.isfinite(value) and bool(torch.isfinite(prediction).all()):
        raise ValueError(
            f"task {task.name!r}: its loss of {float(count):g} labels is {value}, and their "
            "predictions are finite; look for divisions, logarithms and roots of 0 in it."
        )
    _check_derivatives(task, loss, prediction, penalized)


def _check_derivatives(task: Task, loss: Tensor, prediction: Tensor, penalized: bool) -> None:
    """Differentiates a loss as training does. A factor that requires grad lets functions that are
    differentiable once say so."""
    factor = torch.ones_like(loss).requires_grad_()
    found = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(
            factor * loss, prediction, create_graph=penalized, allow_unused=True
        )
    if found is None:
        raise ValueError(
            f"task {task.name!r}: its loss has no graph to the prediction; compute it by torch from "
            "the prediction, without detach(), item(), numpy() and torch.no_grad()."
        )
    if penalized:
        try:
            found.sum().backward()
        except RuntimeError as error:
            raise ValueError(
                f"task {task.name!r}: its loss has no second derivative ({error}), which Rep-MTL's "
                "penalties need; compute it by plain operations of torch, or set "
                "regularizer.lambda_tsr and regularizer.lambda_csa to 0."
            ) from error


def _is_of_torchmetrics(measure: Any) -> bool:
    module = sys.modules.get("torchmetrics")  # whoever has made a metric has loaded it
    return module is not None and isinstance(measure, module.Metric)


def _not_sums(measure: Any) -> list[str]:
    """The states of a metric that are not sums from zero on."""
    return [
        name
        for name, default in measure._defaults.items()
        if not isinstance(default, Tensor)
        or getattr(measure._reductions[name], "__name__", "") != "dim_zero_sum"
        or bool(default.any())
    ]


def _unused(measure: Any) -> Any:
    """A copy that has seen no samples."""
    copy = measure.clone()
    copy.reset()
    return copy


def _fresh(measure: Any, device: torch.device) -> Any:
    """A copy that has seen no samples, in float64, which no process group merges."""
    copy = _unused(measure).to(device)
    copy.sync_on_compute = False
    for name in copy._defaults:
        state = getattr(copy, name)
        if isinstance(state, Tensor) and state.is_floating_point():
            setattr(copy, name, state.double())
    return copy


def _updated(measure: Any, predicted: Tensor, target: Tensor) -> Any:
    """A copy that has seen these samples."""
    copy = _fresh(measure, predicted.device)
    copy.update(predicted, target)
    return copy


def _with_sums(measure: Any, sums: Tensor) -> Any:
    """A copy whose states are given."""
    copy = _fresh(measure, sums.device)
    parts = sums.split([default.numel() for default in copy._defaults.values()])
    for name, part in zip(copy._defaults, parts, strict=True):
        state = getattr(copy, name)
        setattr(copy, name, part.reshape(state.shape).to(state.dtype))
    copy._update_count = 1
    return copy
