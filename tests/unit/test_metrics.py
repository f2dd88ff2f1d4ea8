"""Metrics against slow references: loops over pixels, torch.median, plain counting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from repmtl_ray import metrics


def _unit(shape: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(shape), dim=1)


def _angles(prediction: Tensor, target: Tensor) -> Tensor:
    found = []
    for row, row_target in zip(prediction.double(), target.double(), strict=True):
        for p, t in zip(row.flatten(1).T, row_target.flatten(1).T, strict=True):
            if t.norm() > 0:
                cosine = float(p @ t / (p.norm() * t.norm()))
                found.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
    return torch.tensor(found, dtype=torch.float64)


def test_confusion_metrics_equal_a_loop_over_pixels() -> None:
    torch.manual_seed(0)
    prediction = torch.randn(2, 4, 5, 6)
    target = torch.randint(-1, 3, (2, 5, 6))  # class 3 is predicted but never true
    pairs = [
        (int(t), int(p))
        for t, p in zip(target.flatten(), prediction.argmax(1).flatten(), strict=True)
        if t >= 0
    ]
    shares = []
    for c in range(3):
        union = sum(t == c or p == c for t, p in pairs)
        shares.append(sum(t == p == c for t, p in pairs) / union)
    found = metrics.confusion_metrics(metrics.confusion_statistics(prediction, target))
    assert found["miou"] == pytest.approx(100 * sum(shares) / 3)
    right = sum(t == p for t, p in pairs) / len(pairs)
    assert found["pixel_accuracy"] == pytest.approx(100 * right)


@pytest.mark.parametrize("label", [-2, 3, 255])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    target = torch.tensor([[[0, label]]])
    with pytest.raises(ValueError, match=rf"labels go from .*{label}.*expected 0 to 2, or -1"):
        metrics.confusion_statistics(torch.randn(1, 3, 1, 2), target)


def test_error_metrics_equal_a_loop_over_measured_pixels() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 1, 4, 5), torch.rand(2, 1, 4, 5)
    target[target < 0.4] = 0
    target[0, 0, 0, 0] = torch.inf
    pairs = [
        (float(p), float(t))
        for p, t in zip(prediction.flatten(), target.flatten(), strict=True)
        if 0 < t < math.inf
    ]
    found = metrics.error_metrics(metrics.error_statistics(prediction, target))
    assert found["abs_error"] == pytest.approx(sum(abs(p - t) for p, t in pairs) / len(pairs))
    assert found["rel_error"] == pytest.approx(sum(abs(p - t) / t for p, t in pairs) / len(pairs))


@pytest.mark.parametrize("spread", [0.01, 0.3, 5.0])
def test_angle_metrics_equal_a_loop_over_valid_pixels(spread: float) -> None:
    torch.manual_seed(0)
    target = _unit((2, 3, 6, 7))
    prediction = target + spread * torch.randn_like(target)
    target[:, :, :2] = 0
    angles = _angles(prediction, target)
    found = metrics.angle_metrics(metrics.angle_statistics(prediction, target))
    assert found["mean_angle"] == pytest.approx(float(angles.mean()), abs=1e-5)
    assert (
        abs(found["median_angle"] - float(angles.median())) <= metrics.ANGLE_RESOLUTION / 2 + 1e-5
    )
    for threshold in ("11.25", "22.5", "30"):
        share = float((angles < float(threshold)).double().mean())
        assert found[f"within_{threshold}"] == pytest.approx(100 * share)


@pytest.mark.parametrize("num_pixels", [1, 2, 3, 10])
def test_the_median_of_an_even_number_is_the_lower_middle_one(num_pixels: int) -> None:
    torch.manual_seed(num_pixels)
    target, prediction = _unit((1, 3, 1, num_pixels)), _unit((1, 3, 1, num_pixels))
    found = metrics.angle_metrics(metrics.angle_statistics(prediction, target))["median_angle"]
    assert abs(found - float(_angles(prediction, target).median())) <= 0.005 + 1e-5


def test_shares_within_an_angle_are_counted_not_read_from_the_histogram() -> None:
    degrees = torch.tensor([11.249, 11.2499, 11.2501, 11.251], dtype=torch.float64).deg2rad()
    prediction = torch.stack([degrees.cos(), degrees.sin(), 0 * degrees])[None, :, None]
    target = torch.tensor([1.0, 0, 0], dtype=torch.float64).reshape(1, 3, 1, 1).expand(1, 3, 1, 4)
    found = metrics.angle_metrics(metrics.angle_statistics(prediction, target))
    assert found["within_11.25"] == 50


@pytest.mark.parametrize(("predicted", "angle"), [(1.0, 0.0), (-1.0, 180.0), (0.0, 90.0)])
def test_angles_at_the_ends(predicted: float, angle: float) -> None:
    target = torch.tensor([0.0, 0.6, 0.8]).reshape(1, 3, 1, 1)
    found = metrics.angle_metrics(metrics.angle_statistics(predicted * target, target))
    assert found["mean_angle"] == pytest.approx(angle, abs=1e-5)
    assert found["median_angle"] == pytest.approx(angle, abs=0.005 + 1e-5)


def test_targets_stored_in_half_precision_cost_no_angle() -> None:
    torch.manual_seed(0)
    target = _unit((1, 3, 8, 8)).half().float()
    found = metrics.angle_metrics(metrics.angle_statistics(3 * target, target))
    assert found["mean_angle"] < 1e-4


def test_normals_whose_channels_sum_to_zero_are_valid() -> None:
    target = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1) / 2**0.5
    assert bool(metrics.valid_normal(target))


def test_accuracy_counts_valid_labels_only() -> None:
    logits = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    found = metrics.accuracy_metrics(
        metrics.accuracy_statistics(logits, torch.tensor([0, 0, -1, 1]))
    )
    assert found["accuracy"] == pytest.approx(200 / 3)
