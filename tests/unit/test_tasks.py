"""What every task keeps: sums over valid labels, second derivatives, statistics that add up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.delta import published
from repmtl_ray.tasks import Classification, Depth, InverseDepth, Normals, Segmentation, Task

TASKS: list[Task] = [
    Segmentation(name="segmentation", num_classes=5),
    Depth(name="depth"),
    InverseDepth(name="inverse"),
    Normals(name="normal"),
    Classification(name="amazon", num_classes=4),
]
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def _prediction(task: Task, rows: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (rows, task.num_outputs, 4, 5) if task.dense else (rows, task.num_outputs)
    return torch.randn(shape, dtype=dtype)


def _target(task: Task, rows: int = 6, valid: bool = True) -> Tensor:
    """Half of the labels valid, or none."""
    shape = (rows, 4, 5) if task.dense else (rows,)
    mask = (torch.arange(math.prod(shape)).reshape(shape) % 2 == 0) & torch.tensor(valid)
    if isinstance(task, Segmentation | Classification):
        return torch.where(mask, torch.randint(0, task.num_classes, shape), -1)
    if isinstance(task, Normals):
        normals = torch.nn.functional.normalize(torch.randn(rows, 3, 4, 5), dim=1)
        return normals * mask.unsqueeze(1)
    return (torch.rand(shape) + 0.1).mul(mask).unsqueeze(1)


def _pixels(task: Task, prediction: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not task.dense:
        return list(zip(prediction, target, strict=True))
    columns = prediction.movedim(1, -1).reshape(-1, task.num_outputs)
    if isinstance(task, Segmentation):
        return list(zip(columns, target.flatten(), strict=True))
    return list(zip(columns, target.movedim(1, -1).reshape(len(columns), -1), strict=True))


def _slow_loss(task: Task, prediction: Tensor, target: Tensor) -> tuple[float, int]:
    losses = []
    for p, t in _pixels(task, prediction, target):
        if isinstance(task, Segmentation | Classification):
            if t >= 0:
                losses.append(float(-p.log_softmax(0)[t]))
        elif isinstance(task, Normals):
            if t.norm() > 0:
                losses.append(1 - float(p @ t.double() / p.norm()))
        elif t > 0:
            losses.append(abs(float(p - t)))
    return sum(losses), len(losses)


@by_name
def test_the_loss_is_the_sum_over_valid_labels(task: Any) -> None:
    torch.manual_seed(0)
    prediction, target = _prediction(task), _target(task)
    loss, count = task.loss_sum(prediction, target)
    slow_loss, slow_count = _slow_loss(task, prediction, target)
    assert float(count) == slow_count > 0
    # the normals' epsilon, 1e-4 against lengths around 1, moves a cosine by 1e-8
    assert float(loss) == pytest.approx(slow_loss, rel=1e-6)
    assert loss.shape == count.shape == ()
    assert loss.dtype == count.dtype


@by_name
def test_losses_and_counts_add_over_rows(task: Any) -> None:
    torch.manual_seed(0)
    prediction, target = _prediction(task), _target(task)
    whole = torch.stack(task.loss_sum(prediction, target))
    parts = [torch.stack(task.loss_sum(prediction[r], target[r])) for r in (slice(2), slice(2, 6))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@by_name
def test_without_valid_labels_loss_and_gradients_are_zero(task: Any) -> None:
    prediction = _prediction(task).requires_grad_()
    loss, count = task.loss_sum(prediction, _target(task, valid=False))
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (second,) = torch.autograd.grad((gradient + prediction).square().sum(), prediction)
    assert float(loss.detach()) == float(count) == 0
    assert not gradient.any()
    torch.testing.assert_close(second, 2 * prediction.detach())


@by_name
def test_first_and_second_derivatives_are_right(task: Any) -> None:
    torch.manual_seed(0)
    prediction, target = _prediction(task, rows=2).requires_grad_(), _target(task, rows=2)
    assert torch.autograd.gradcheck(lambda p: task.loss_sum(p, target)[0], prediction)
    assert torch.autograd.gradgradcheck(lambda p: task.loss_sum(p, target)[0], prediction)


@by_name
def test_a_prediction_of_zero_has_finite_derivatives(task: Any) -> None:
    torch.manual_seed(0)
    prediction = torch.zeros_like(_prediction(task, dtype=torch.float32)).requires_grad_()
    loss, _ = task.loss_sum(prediction, _target(task))
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), prediction, allow_unused=True)
    assert gradient.isfinite().all()
    assert second is None or second.isfinite().all()


@by_name
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_computed_in_float32_at_least(task: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    target, exact = _target(task), _prediction(task)
    low = exact.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = task.loss_sum(low, target)
        loss_64, _ = task.loss_sum(exact, target)
    assert loss.dtype == torch.float32
    assert loss_64.dtype == torch.float64
    reference, _ = task.loss_sum(low.double(), target)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)


@by_name
def test_statistics_add_over_rows(task: Any) -> None:
    torch.manual_seed(0)
    prediction, target = _prediction(task), _target(task)
    whole = task.statistics(prediction, target)
    parts = [task.statistics(prediction[r], target[r]) for r in (slice(1), slice(1, 6))]
    assert whole.shape == (task.num_statistics,)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(parts[0] + parts[1], whole)


@by_name
def test_metrics_are_those_with_directions_and_finite(task: Any) -> None:
    torch.manual_seed(0)
    values = task.metrics(task.statistics(_prediction(task), _target(task)))
    assert set(values) == set(task.metric_directions)
    assert all(math.isfinite(value) for value in values.values())


@by_name
def test_a_split_without_labels_is_an_error_that_names_task_and_metric(task: Any) -> None:
    statistics = task.statistics(_prediction(task), _target(task, valid=False))
    assert not statistics.any()
    metric = next(iter(task.metric_directions))
    with pytest.raises(ValueError, match=f"task '{task.name}': {metric} has no valid label"):
        task.metrics(statistics)


@pytest.mark.parametrize("task", TASKS[1:4], ids=lambda task: task.name)
def test_predictions_that_are_not_finite_are_an_error(task: Any) -> None:
    prediction = torch.full_like(_prediction(task), torch.nan)
    with pytest.raises(ValueError, match=f"task '{task.name}': .*predictions are not finite"):
        task.metrics(task.statistics(prediction, _target(task)))


def test_metric_names_and_directions_are_those_of_the_published_tables() -> None:
    known = {name: up for task in TASKS for name, up in task.metric_directions.items()}
    for dataset in ("nyuv2", "cityscapes", "office_31", "office_home"):
        names = {name for row in published(dataset).values() for name in row if "/" in name}
        assert {name.rpartition("/")[2] for name in names} <= set(known)
    assert [name for name, up in known.items() if not up] == [
        "abs_error",
        "rel_error",
        "mean_angle",
        "median_angle",
    ]


def test_tasks_are_frozen_keyword_only_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS[0].name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Depth("depth")  # type: ignore[call-arg, misc]
    with pytest.raises(TypeError):
        Task(name="abstract")  # type: ignore[abstract]
    with pytest.raises(ValueError, match="task name 'a/b'"):
        Depth(name="a/b")
    with pytest.raises(ValueError, match="num_classes is 1; expected at least 2"):
        Segmentation(name="segmentation", num_classes=1)


def test_a_wrong_label_is_an_error_that_names_the_task() -> None:
    task = TASKS[0]
    with pytest.raises(ValueError, match="task 'segmentation': labels go from 255 to 255"):
        task.statistics(_prediction(task, rows=1), torch.full((1, 4, 5), 255))
