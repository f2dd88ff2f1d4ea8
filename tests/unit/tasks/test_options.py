"""Options of the tasks: weights, smoothing, top-k, the logarithmic depth loss; against slow code in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.data.description import describe_task
from repmtl_ray.tasks import Classification, Depth, InverseDepth, Segmentation, Task

WEIGHTS = (0.1, 0.0, 2.0, 0.5)
DEPTH_MEASURES = ("abs_error", "rel_error", "rmse", "delta_1", "delta_2", "delta_3")
TASKS: list[Task] = [
    Classification(name="smooth", num_classes=4, label_smoothing=0.2, top_k=2),
    Classification(name="weighed", num_classes=4, class_weights=WEIGHTS),
    Classification(name="both", num_classes=4, class_weights=WEIGHTS, label_smoothing=0.3, top_k=3),
    Segmentation(name="parts", num_classes=4, class_weights=WEIGHTS),
    Depth(name="silog", loss="silog", measures=DEPTH_MEASURES),
    InverseDepth(name="inverse", measures=("delta_1",)),
]
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def example(task: Any, rows: int = 12, known: float = 0.7) -> tuple[Tensor, Tensor]:
    """Some labels are not known, and one image has none."""
    generator = torch.Generator().manual_seed(0)
    positions = (3, 4) if task.dense else ()
    prediction = torch.randn(
        rows, task.num_outputs, *positions, generator=generator, dtype=torch.float64
    )
    is_known = torch.rand(rows, *positions, generator=generator) < known
    is_known[1] = False
    if not isinstance(task, Depth | InverseDepth):
        labels = torch.randint(0, 4, (rows, *positions), generator=generator)
        return prediction, torch.where(is_known, labels, -1)
    depth = torch.rand(rows, *positions, generator=generator, dtype=torch.float64) + 0.5
    return prediction.abs() * 2, (depth * is_known).unsqueeze(1)


def slow_entropy(task: Any, prediction: Tensor, target: Tensor) -> tuple[float, float]:
    weights = task.class_weights or (1.0,) * 4
    smoothing = getattr(task, "label_smoothing", 0.0)
    total, weight = 0.0, 0.0
    columns = prediction.movedim(1, -1).reshape(-1, 4)
    for logits, label in zip(columns, target.flatten().tolist(), strict=True):
        if label >= 0:
            logs = logits.log_softmax(0).tolist()
            spread = sum(w * log for w, log in zip(weights, logs, strict=True)) / 4
            total -= (1 - smoothing) * weights[label] * logs[label] + smoothing * spread
            weight += weights[label]
    return total, weight


def slow_silog(prediction: Tensor, target: Tensor) -> tuple[float, float]:
    total, images = 0.0, 0
    for p, t in zip(prediction, target, strict=True):
        pairs = [
            (a, b) for a, b in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True) if b
        ]
        if pairs:
            logs = [
                math.log(a) if a > 0.01 else math.log(0.01) + (a - 0.01) / 0.01 for a, _ in pairs
            ]
            d = [log - math.log(b) for log, (_, b) in zip(logs, pairs, strict=True)]
            total += sum(x * x for x in d) / len(d) - 0.5 * (sum(d) / len(d)) ** 2
            images += 1
    return total, images


@by_name
def test_the_loss_is_that_of_slow_code_and_adds_over_rows(task: Any) -> None:
    prediction, target = example(task)
    if isinstance(task, Depth):
        prediction[0, 0, 0, 0] = -0.3  # where no logarithm exists
        expected = slow_silog(prediction, target)
    elif isinstance(task, InverseDepth):
        valid = target > 0
        expected = float((prediction - target)[valid].abs().sum()), int(valid.sum())
    else:
        expected = slow_entropy(task, prediction, target)
    whole = torch.stack(task.loss_sum(prediction, target))
    assert whole.tolist() == pytest.approx(expected, rel=1e-12)
    parts = [torch.stack(task.loss_sum(prediction[r], target[r])) for r in (slice(5), slice(5, 12))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_weights_and_smoothing_are_those_of_torch() -> None:
    task = TASKS[2]
    prediction, target = example(task)
    loss, count = task.loss_sum(prediction, target)
    expected = torch.nn.functional.cross_entropy(
        prediction,
        target,
        torch.tensor(WEIGHTS, dtype=torch.float64),
        ignore_index=-1,
        label_smoothing=0.3,
    )
    torch.testing.assert_close(loss / count, expected)


@by_name
def test_metrics_are_those_of_slow_code_however_rows_are_split(task: Any) -> None:
    prediction, target = example(task)
    parts = (slice(0), slice(5), slice(5, 12))
    statistics = torch.stack([task.statistics(prediction[p], target[p]) for p in parts]).sum(dim=0)
    assert statistics.shape == (task.num_statistics,)
    values = task.metrics(statistics)
    assert set(values) == set(task.metric_directions)
    if task.dense and not isinstance(task, Segmentation):
        valid = target > 0
        p, t = prediction[valid].tolist(), target[valid].tolist()
        pairs = list(zip(p, t, strict=True))
        expected = {"rmse": math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))}
        for k in (1, 2, 3):
            within = [max(a / b, b / a) < 1.25**k for a, b in pairs]
            expected[f"delta_{k}"] = 100 * sum(within) / len(within)
        assert {n: v for n, v in values.items() if n in expected} == pytest.approx(
            {n: v for n, v in expected.items() if n in values}
        )
    elif isinstance(task, Classification) and task.top_k:
        known = [
            (p.tolist(), t) for p, t in zip(prediction, target.tolist(), strict=True) if t >= 0
        ]
        ranks = [sum(other > p[t] for other in p) for p, t in known]
        expected = {
            "accuracy": 100 * sum(r == 0 for r in ranks) / len(ranks),
            "top_k_accuracy": 100 * sum(r < task.top_k for r in ranks) / len(ranks),
        }
        assert values == pytest.approx(expected)


@by_name
def test_derivatives_are_right_and_exist_twice(task: Any) -> None:
    prediction, target = example(task, rows=3)
    prediction = (prediction + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: task.loss_sum(p, target)[0], prediction)
    assert torch.autograd.gradgradcheck(lambda p: task.loss_sum(p, target)[0], prediction)


@by_name
def test_without_known_labels_loss_and_gradients_are_zero(task: Any) -> None:
    prediction, target = example(task, known=0.0)
    loss, count = task.loss_sum(prediction.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert float(loss.detach()) == float(count) == 0
    assert not gradient.any()


@by_name
def test_losses_are_computed_in_float32_at_least(task: Any) -> None:
    prediction, target = example(task)
    loss, _ = task.loss_sum(prediction.bfloat16(), target)
    reference, _ = task.loss_sum(prediction.bfloat16().double(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-4, atol=1e-5)


def test_options_at_their_defaults_are_in_no_description() -> None:
    plain = [Classification(name="a", num_classes=3), Depth(name="a")]
    assert [dict(describe_task(task).settings) for task in plain] == [{"num_classes": 3}, {}]
    given = describe_task(Classification(name="a", num_classes=3, class_weights=[1, 2, 3], top_k=2))
    assert given.settings == {"num_classes": 3, "class_weights": [1.0, 2.0, 3.0], "top_k": 2}


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (Classification, {"class_weights": (1.0,)}, "class_weights is .*3 numbers"),
        (Segmentation, {"class_weights": (1.0, -1.0, 0.0)}, "class_weights is -1"),
        (Segmentation, {"class_weights": (0.0, 0.0, 0.0)}, "a weight above 0"),
        (Classification, {"label_smoothing": 1.0}, r"label_smoothing is 1.0; .*\[0, 1\)"),
        (Classification, {"top_k": 3}, "top_k is 3; expected 2 to 2"),
        (Depth, {"loss": "log"}, "loss is 'log'; expected one of 'l1', 'silog'"),
        (Depth, {"measures": ("delta_4",)}, "measures is .*delta_3"),
    ],
)
def test_wrong_options_are_one_line(make: Any, changes: dict[str, Any], message: str) -> None:
    settings = {} if make is Depth else {"num_classes": 3}
    with pytest.raises(ValueError, match=f"task 'a'.*{message}") as caught:
        make(**{"name": "a", **settings, **changes})
    assert "\n" not in str(caught.value)


def test_every_option_is_tried() -> None:
    names = set(itertools.chain.from_iterable(task.metric_directions for task in TASKS))
    assert {"top_k_accuracy", *DEPTH_MEASURES} <= names
