"""Losses and metrics of the user's own: exact however rows are split, and one line if they are wrong."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from repmtl_ray import user_code
from repmtl_ray.data.description import describe_task, tasks_of
from repmtl_ray.delta import delta_p
from repmtl_ray.tasks import CustomTask, Regression
from repmtl_ray.tasks.custom import check_on
from tests.helpers.problems import is_below, pinball, quantile_tasks, softmax

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at its import
    import torchmetrics


def by_row(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.argmax(dim=1) == target).double().mean(dim=(1, 2))


def entropy_by_row(prediction: Tensor, target: Tensor) -> Tensor:
    loss = functional.cross_entropy(prediction, target.clamp(min=0), reduction="none")
    return (loss * (target >= 0)).sum(dim=(1, 2))


def labels_task() -> CustomTask:
    """Maps, whose metric has states that are sums."""
    measure = torchmetrics.JaccardIndex(task="multiclass", num_classes=3, ignore_index=-1)
    return CustomTask(
        name="parts",
        kind="label",
        num_outputs=3,
        num_classes=3,
        loss=entropy_by_row,
        measures={"iou_up": measure, "accuracy": by_row},
    )


def pairs_task() -> CustomTask:
    """Two numbers a sample from three outputs."""
    return CustomTask(
        name="pair",
        num_outputs=3,
        num_targets=2,
        loss=lambda p, t: (p[:, :2] - t).square().mean(dim=1) + p[:, 2].abs(),
        measures={"error_down": lambda p, t: (p[:, :2] - t).abs().sum(dim=1)},
    )


TASKS: dict[str, Callable[[], CustomTask]] = {
    "quantile": lambda: quantile_tasks()[0],  # type: ignore[dict-item, return-value]
    "taste": lambda: quantile_tasks()[1],  # type: ignore[dict-item, return-value]
    "parts": labels_task,
    "pair": pairs_task,
}
by_name = pytest.mark.parametrize("name", sorted(TASKS))


def example(task: CustomTask, rows: int = 30, known: float = 0.7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = (3, 4) if task.dense else ()
    prediction = torch.randn(
        rows, task.num_outputs, *positions, generator=generator, dtype=torch.float64
    )
    is_known = torch.rand(rows, generator=generator) < known
    if task.kind in ("class", "label"):
        target = torch.randint(0, 3, (rows, *positions), generator=generator)
        return prediction, torch.where(is_known.reshape(-1, *[1] * len(positions)), target, -1)
    shape = (rows, task.num_targets) if task.num_targets > 1 else (rows,)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    return prediction, torch.where(is_known.reshape(-1, *[1] * (len(shape) - 1)), target, torch.nan)


@by_name
def test_losses_and_metrics_are_the_same_however_rows_are_split(name: str) -> None:
    task = TASKS[name]()
    prediction, target = example(task)
    parts = [slice(0, 0), slice(0, 7), slice(7, 8), slice(8, 30)]
    pairs = [torch.stack(task.loss_sum(prediction[p], target[p])) for p in parts]
    torch.testing.assert_close(
        torch.stack(pairs).sum(dim=0), torch.stack(task.loss_sum(prediction, target))
    )
    statistics = torch.stack([task.statistics(prediction[p], target[p]) for p in parts]).sum(dim=0)
    collected = whole_rows = None
    if task.num_columns:
        collected = torch.cat([task.collected(prediction[p], target[p]) for p in reversed(parts)])
        whole_rows = task.collected(prediction, target)
    values = task.metrics(statistics, collected)
    whole = task.metrics(task.statistics(prediction, target), whole_rows)
    assert values == pytest.approx(whole, rel=1e-12)
    assert set(values) == set(task.metric_directions)
    assert statistics.shape == (task.num_statistics,)


@by_name
def test_samples_without_a_label_are_never_seen(name: str) -> None:
    task = TASKS[name]()
    prediction, target = example(task)
    _, of_nothing = example(task, known=0.0)
    loss, count = task.loss_sum(prediction.requires_grad_(), of_nothing)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert float(count) == 0
    assert not gradient.any()
    with pytest.raises(ValueError, match=f"task '{name}': .* has no valid label"):
        task.metrics(task.statistics(prediction, of_nothing), prediction.new_zeros(0, 2))
    loss, _ = task.loss_sum(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    is_known = target >= 0 if target.dtype == torch.int64 else target.isfinite()
    of_row = is_known.reshape(30, -1).any(dim=1)
    assert not gradient[~of_row].any()
    assert gradient.isfinite().all()


def test_values_are_those_of_slow_code() -> None:
    quantile, taste = quantile_tasks()
    prediction, target = example(quantile)  # type: ignore[arg-type]
    known = target.isfinite()
    error = (target - prediction[:, 0])[known]
    loss, count = quantile.loss_sum(prediction, target)
    assert float(loss) == pytest.approx(float(sum(max(0.7 * e, -0.3 * e) for e in error.tolist())))
    assert float(count) == int(known.sum())
    values = quantile.metrics(
        quantile.statistics(prediction, target), quantile.collected(prediction, target)
    )
    total = target[known] - target[known].mean()
    assert values["r2"] == pytest.approx(1 - float(error.square().sum() / total.square().sum()))
    correlation = torch.corrcoef(torch.stack([prediction[known, 0], target[known]]))[0, 1]
    assert values["pearson"] == pytest.approx(float(correlation))
    assert values["share_below_up"] == pytest.approx(float((error < 0).double().mean()))
    prediction, target = example(taste)  # type: ignore[arg-type]
    weight = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    expected = functional.cross_entropy(prediction, target, weight, ignore_index=-1)
    loss, count = taste.loss_sum(prediction, target)
    assert float(loss / count) == pytest.approx(float(expected))


def test_maps_are_counted_as_torchmetrics_counts_them() -> None:
    task = labels_task()
    prediction, target = example(task)
    whole = torchmetrics.JaccardIndex(task="multiclass", num_classes=3, ignore_index=-1)
    expected = float(whole(prediction, target))
    values = task.metrics(task.statistics(prediction, target))
    assert values["iou_up"] == pytest.approx(expected, rel=1e-6)


def test_a_metric_that_was_used_and_one_that_was_not_make_equal_tasks() -> None:
    used = torchmetrics.R2Score()
    used(torch.rand(4), torch.rand(4))
    first, second = (
        CustomTask(name="a", loss=pinball, measures={"r2": measure})
        for measure in (used, torchmetrics.R2Score())
    )
    assert describe_task(first) == describe_task(second)


def test_a_description_tells_one_loss_and_one_metric_from_another() -> None:
    def task(**changes: Any) -> CustomTask:
        return CustomTask(**{"name": "a", "loss": pinball, "measures": {"r2": is_below}, **changes})

    one = describe_task(task())
    assert one.code == user_code.identity([pinball, {"r2": is_below}, None])
    assert "loss" not in one.settings
    others = [
        task(loss=lambda p, t: (p - t).abs()),
        task(measures={"r2": torchmetrics.R2Score()}),
        task(predict=softmax),
    ]
    assert len({one.code, *(describe_task(other).code for other in others)}) == 4
    with pytest.raises(ValueError, match="task 'a' is of the class CustomTask, whose code no file"):
        tasks_of(dataclasses.make_dataclass("Data", ["tasks"])((one,)))


def test_a_direction_is_in_the_name_of_a_metric() -> None:
    row, base = {"a/depth_down": 1.0, "a/gain_up": 3.0}, {"a/depth_down": 2.0, "a/gain_up": 2.0}
    assert delta_p(row, base).metric == pytest.approx(50)


MEASURES: dict[str, Any] = {"r2": is_below}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "image"}, "kind is 'image'; expected one of label"),
        ({"num_outputs": 0}, "num_outputs is 0"),
        ({"num_targets": 1.5}, "num_targets is 1.5; expected an integer"),
        (
            {"kind": "class", "num_targets": 2},
            "num_targets is 2; expected nothing with kind 'class'",
        ),
        ({"num_classes": 3}, "num_classes is 3; expected nothing with kind 'value'"),
        ({"loss": "l1"}, "loss is 'l1'; expected a function"),
        ({"predict": 3}, "predict is 3"),
        ({"measures": {}}, "measures is {}; expected metrics by name"),
        ({"measures": {"spread": is_below}}, "the name does not say whether more is better"),
        ({"measures": {"r2": 3}}, r"measures\['r2'\] is 3; expected a function"),
        (
            {"measures": {"r2": torchmetrics.MetricCollection([torchmetrics.R2Score()])}},
            r"measures\['r2'\] is .*one metric of torchmetrics",
        ),
        ({"measures": {"r2": torchmetrics.R2Score}}, "expected a function"),
        (
            {"measures": {"r2": torchmetrics.MeanSquaredError()}},
            "MeanSquaredError says that less is better",
        ),
        (
            {"kind": "depth", "measures": {"pearson": torchmetrics.PearsonCorrCoef()}},
            "PearsonCorrCoef cannot be merged over workers: its mean_x, .* no sum",
        ),
    ],
)
def test_wrong_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'a'.*{message}") as caught:
        CustomTask(**{"name": "a", "loss": pinball, "measures": MEASURES, **changes})
    assert "\n" not in str(caught.value)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * cotangent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": functional.mse_loss}, r"loss of 8 samples is a scalar; expected .*\[8\]"),
        ({"loss": lambda p, t: (p[:, None] - t) ** 2}, r"a tensor of shape \(8, 8\)"),
        ({"loss": lambda p, t: 3.0}, "is a float"),
        ({"loss": lambda p, t: (p, t)}, r"two tensors of the shapes \(8,\) and \(8,\)"),
        ({"loss": lambda p, t: (p - t).detach().abs()}, "its loss has no graph"),
        ({"loss": lambda p, t: OnceOnly.apply(p - t)}, "no second derivative .*lambda_tsr"),
        (
            {"loss": lambda p, t: (p - p).log()},
            r"its loss of 8 labels is -inf, and their predictions",
        ),
        ({"loss": lambda p, t: p @ t[:3]}, r"cannot be computed .* \(8, 1\) and \(8,\)"),
        ({"measures": {"r2": lambda p, t: (p - t).mean()}}, r"measures\['r2'\] of samples is \(\)"),
        ({"measures": {"r2": lambda p, t: p @ t[:3]}}, "a metric cannot be computed"),
        (
            {"loss": lambda p, t: int("x")},
            r"cannot be computed .*ValueError: .*\(test_custom_task\.py",
        ),
    ],
)
def test_what_cannot_be_trained_is_found_on_a_few_samples(
    changes: dict[str, Any], message: str
) -> None:
    task = CustomTask(**{"name": "a", "loss": pinball, "measures": MEASURES, **changes})
    prediction, target = example(task, rows=8, known=1.0)
    with pytest.raises(ValueError, match=f"task 'a'.*{message}") as caught:
        check_on(task, prediction, target, penalized=True)
    assert "\n" not in str(caught.value)


def test_a_metric_that_is_several_numbers_says_so() -> None:
    task = CustomTask(
        name="a",
        num_outputs=2,
        num_targets=2,
        loss=lambda p, t: (p - t).abs().sum(dim=1),
        measures={"r2": torchmetrics.R2Score(multioutput="raw_values")},
    )
    prediction, target = example(task)
    with pytest.raises(ValueError, match=r"measures\['r2'\].of the split is of shape \(2,\)"):
        task.metrics(task.statistics(prediction, target), task.collected(prediction, target))
    with pytest.raises(ValueError, match=r"measures\['r2'\].of the split is of shape \(2,\)"):
        check_on(task, prediction, target, penalized=True)  # before training


def test_a_class_of_ones_own_is_looked_at_too() -> None:
    class Mean(Regression):  # type: ignore[misc]
        def loss_sum(self, prediction: Tensor, target: Tensor) -> Any:
            return super().loss_sum(prediction, target)[0]

    with pytest.raises(ValueError, match=r"loss_sum\(\.\.\.\) is .*expected two scalars"):
        check_on(Mean(name="a"), torch.ones(3, 1), torch.ones(3), penalized=False)


def test_maps_are_looked_at_before_training() -> None:
    task = labels_task()
    check_on(task, *example(task, rows=8), penalized=True)


def test_metrics_of_few_samples_may_be_undefined_before_training() -> None:
    quantile, taste = quantile_tasks()
    for task in (quantile, taste):
        prediction, target = example(task, rows=8, known=1.0)  # type: ignore[arg-type]
        check_on(task, prediction[:1], target[:1], penalized=True)
