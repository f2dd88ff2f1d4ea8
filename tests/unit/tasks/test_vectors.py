"""Numbers and yes-or-no answers: losses and metrics against slow ones, gaps, and sums over batches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from repmtl_ray.tasks import Binary, MultiLabel, Regression, Task
from repmtl_ray.tasks.vectors import check_answers

ALL = ("auc", "average_precision", "f1", "accuracy")
TASKS: list[Task] = [
    Regression(name="one"),
    Regression(name="squares", num_values=3, loss="l2"),
    Regression(name="huber", num_values=2, loss="huber", delta=0.3),
    Binary(name="click", pos_weight=2.5, measures=ALL),
    MultiLabel(name="topics", num_labels=3, pos_weight=(1.0, 0.5, 4.0), measures=ALL),
]
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def example(task: Any, rows: int = 40, valid: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions and targets, of which a third is not known; predictions with ties."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(rows, task.num_outputs, generator=generator, dtype=torch.float64)
    prediction = (prediction * 4).round() / 4
    known = torch.rand(rows, task.num_outputs, generator=generator) < (2 / 3 if valid else 0)
    if isinstance(task, Regression):
        target = torch.randn(rows, task.num_outputs, generator=generator, dtype=torch.float64)
        return prediction, torch.where(known, target, torch.nan)
    target = (torch.rand(rows, task.num_outputs, generator=generator) < 0.4).long()
    return prediction, torch.where(known, target, -1)


def slow_loss(task: Any, prediction: Tensor, target: Tensor) -> tuple[float, int]:
    losses = []
    for row, column in itertools.product(range(len(target)), range(task.num_outputs)):
        p, t = float(prediction[row, column]), float(target[row, column])
        if isinstance(task, Regression):
            if not math.isnan(t):
                e = abs(p - t)
                huber = e * e / 2 if e <= task.delta else task.delta * (e - task.delta / 2)
                losses.append({"l1": e, "l2": e * e, "huber": huber}[task.loss])
        elif t >= 0:
            weights = task._pos_weights
            weight = weights[column % len(weights)]
            losses.append(weight * math.log1p(math.exp(-p)) if t else math.log1p(math.exp(p)))
    return sum(losses), len(losses)


def slow_ranking(scores: list[float], labels: list[float]) -> dict[str, float]:
    """Of every pair of a 1 and a 0; and precision at every distinct threshold."""
    ones = [s for s, label in zip(scores, labels, strict=True) if label]
    zeros = [s for s, label in zip(scores, labels, strict=True) if not label]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in zeros]
    precision, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [label for s, label in zip(scores, labels, strict=True) if s >= threshold]
        recall = sum(above) / len(ones)
        precision += (recall - recall_before) * sum(above) / len(above)
        recall_before = recall
    return {"auc": 100 * float(np.mean(pairs)), "average_precision": 100 * precision}


def slow_metrics(task: Any, prediction: Tensor, target: Tensor) -> dict[str, float]:
    if isinstance(task, Regression):
        errors = (prediction - target)[~target.isnan()]
        return {
            "abs_error": float(errors.abs().mean()),
            "rmse": float(errors.norm()) / len(errors) ** 0.5,
        }
    by_label = []
    for column in range(task.num_outputs):
        known = target[:, column] >= 0
        scores, labels = prediction[known, column].tolist(), target[known, column].tolist()
        hits = [(s > 0) == bool(label) for s, label in zip(scores, labels, strict=True)]
        found = sum(s > 0 and label for s, label in zip(scores, labels, strict=True))
        f1 = 100 * 2 * found / (sum(s > 0 for s in scores) + sum(labels))
        by_label.append(
            {**slow_ranking(scores, labels), "f1": f1, "accuracy": 100 * float(np.mean(hits))}
        )
    return {name: float(np.mean([of[name] for of in by_label])) for name in ALL}


@by_name
def test_the_loss_is_the_sum_over_known_labels(task: Any) -> None:
    prediction, target = example(task)
    loss, count = task.loss_sum(prediction, target)
    expected, expected_count = slow_loss(task, prediction, target)
    assert float(count) == expected_count > 0
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    single = target[:, 0] if task.num_outputs == 1 else target  # as a column of single numbers
    torch.testing.assert_close(task.loss_sum(prediction, single)[0], loss)


@by_name
def test_metrics_equal_slow_ones_however_the_rows_are_split(task: Any) -> None:
    prediction, target = example(task)
    parts = [slice(0, 0), slice(0, 7), slice(7, 8), slice(8, 40)]
    statistics = torch.stack([task.statistics(prediction[p], target[p]) for p in parts]).sum(dim=0)
    collected = torch.cat([task.collected(prediction[p], target[p]) for p in reversed(parts)])
    assert collected.shape[1] == task.num_columns
    values = task.metrics(statistics, collected)
    whole = task.metrics(task.statistics(prediction, target), task.collected(prediction, target))
    assert values == whole  # to the bit
    assert set(values) == set(task.metric_directions)
    assert values == pytest.approx(slow_metrics(task, prediction, target), rel=1e-12)


@by_name
def test_losses_and_counts_add_over_rows(task: Any) -> None:
    prediction, target = example(task)
    whole = torch.stack(task.loss_sum(prediction, target))
    parts = [torch.stack(task.loss_sum(prediction[r], target[r])) for r in (slice(9), slice(9, 40))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@by_name
def test_without_known_labels_loss_and_gradients_are_zero(task: Any) -> None:
    prediction, target = example(task, valid=False)
    loss, count = task.loss_sum(prediction.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (second,) = torch.autograd.grad((gradient + prediction).square().sum(), prediction)
    assert float(loss.detach()) == float(count) == 0
    assert not gradient.any()
    torch.testing.assert_close(second, 2 * prediction.detach())
    with pytest.raises(ValueError, match=f"task '{task.name}': .* has no valid label"):
        task.metrics(
            task.statistics(prediction.detach(), target),
            task.collected(prediction.detach(), target),
        )


@by_name
def test_derivatives_are_right_and_exist_twice(task: Any) -> None:
    prediction, target = example(task, rows=3)
    prediction = (prediction + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: task.loss_sum(p, target)[0], prediction)
    assert torch.autograd.gradgradcheck(lambda p: task.loss_sum(p, target)[0], prediction)


@by_name
def test_losses_are_computed_in_float32_at_least(task: Any) -> None:
    prediction, target = example(task)
    loss, _ = task.loss_sum(prediction.bfloat16(), target)
    reference, _ = task.loss_sum(prediction.bfloat16().double(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)


def test_one_class_alone_has_no_area() -> None:
    task = Binary(name="click")
    with pytest.raises(
        ValueError, match=r"task 'click': auc .* only labels of one kind: f1 needs a 1"
    ):
        task.metrics(
            task.statistics(torch.ones(3, 1), torch.ones(3)),
            task.collected(torch.ones(3, 1), torch.ones(3)),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(name="a", num_values=0), "num_values is 0"),
        (lambda: Regression(name="a", loss="l3"), "loss is 'l3'"),
        (lambda: Regression(name="a", delta=0.0), "delta is 0.0"),
        (lambda: Binary(name="a", pos_weight=-1.0), "pos_weight is -1.0"),
        (lambda: Binary(name="a", measures=("roc",)), "measures is .*auc, average_precision"),
        (lambda: MultiLabel(name="a", num_labels=3, pos_weight=(1.0, 2.0)), "one number, or 3"),
    ],
)
def test_wrong_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"task 'a'.*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_labels_that_do_not_allow_a_metric_are_found_before_an_evaluation() -> None:
    only_ones, both = np.array([[False, True]]), np.array([[True, True]])
    check_answers(Binary(name="a"), both)
    check_answers(Binary(name="a", measures=("f1", "accuracy")), only_ones)
    check_answers(Regression(name="a"), only_ones)
    for measures in (("auc",), ("average_precision", "f1")):
        with pytest.raises(ValueError, match=r"task 'a': .* only labels of one kind"):
            check_answers(Binary(name="a", measures=measures), only_ones)
    many = MultiLabel(name="a", num_labels=3)
    check_answers(many, np.array([[True, False], [True, True], [False, False]]))
    with pytest.raises(ValueError, match=r"task 'a': auc .* only labels of one kind"):
        check_answers(many, np.array([[True, False], [False, True], [False, False]]))
