"""Metrics as sums: statistics that add up over batches and workers, and the metrics in them.

Owns the additive statistics (confusion matrix, error sums, angle histogram), the rule which labels
are valid, and the names and directions of all metrics. Which task reports which metrics is in
`tasks`. Statistics are flat float64 vectors that are added over batches and workers, so the metrics
depend on neither the batch size nor the number of workers. Shares are in percent, angles in degrees,
and depth errors in the unit of the depth (relative errors have none).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from repmtl_ray.data.columns import IGNORE_LABEL, INVALID_DEPTH

HIGHER_IS_BETTER: Mapping[str, bool] = MappingProxyType(
    {
        "miou": True,
        "pixel_accuracy": True,
        "abs_error": False,
        "rel_error": False,
        "mean_angle": False,
        "median_angle": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
        "accuracy": True,
        "top_k_accuracy": True,
        "rmse": False,
        "delta_1": True,
        "delta_2": True,
        "delta_3": True,
        "auc": True,
        "average_precision": True,
        "f1": True,
        # Of metrics that tasks of the user's own may have.
        "calibration_error": False,
        "dice": True,
        "kendall": True,
        "log_loss": False,
        "mrr": True,
        "ndcg": True,
        "pearson": True,
        "precision": True,
        "psnr": True,
        "r2": True,
        "recall": True,
        "spearman": True,
        "ssim": True,
    }
)
"""The metrics whose direction is known, by the last part of their names."""
_SUFFIXES = {"_up": True, "_down": False}
"""What the names of all other metrics end in: whoever reads a stored result knows the direction."""

ANGLE_RESOLUTION = 0.01
"""The bin width of the angle histogram in degrees. The median is the centre of a bin, so its error
is at most half of this.
"""
_NUM_BINS = 18_000
_WITHIN = {"within_11.25": 11.25, "within_22.5": 22.5, "within_30": 30.0}
_RATIOS = {"delta_1": 1.25, "delta_2": 1.25**2, "delta_3": 1.25**3}
NUM_ERROR_STATISTICS = 3
NUM_DEPTH_STATISTICS = NUM_ERROR_STATISTICS + 1 + len(_RATIOS)
NUM_ANGLE_STATISTICS = _NUM_BINS + len(_WITHIN) + 1
NUM_ACCURACY_STATISTICS = 2


def higher_is_better(metric: str) -> bool | None:
    """Whether more of a metric is better, by the last part of its name; None of what is no metric."""
    if metric in HIGHER_IS_BETTER:
        return HIGHER_IS_BETTER[metric]
    return next((up for suffix, up in _SUFFIXES.items() if metric.endswith(suffix)), None)


def valid_depth(target: Tensor) -> Tensor:
    """Where depth (or inverse depth) was measured: positive and finite; same shape, bool."""
    return (target > INVALID_DEPTH) & torch.isfinite(target)


def valid_normal(target: Tensor) -> Tensor:
    """Where a normal was measured: not the zero vector.

    Args:
        target: [rows, 3, *positions].

    Returns:
        [rows, *positions], bool. (Older code tests whether the channels sum to zero, which also
        drops valid normals.)
    """
    return (target != 0).any(dim=1)


def confusion_statistics(prediction: Tensor, target: Tensor) -> Tensor:
    """The confusion matrix with one row per target class, flattened.

    Args:
        prediction: [rows, classes, *positions] logits.
        target: [rows, *positions] int64, ignore -1.

    Returns:
        [classes * classes].

    Raises:
        ValueError: a label outside -1 .. classes - 1.
    """
    num_classes = prediction.shape[1]
    valid = target != IGNORE_LABEL
    target = target[valid]
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < num_classes:
        raise ValueError(
            f"labels go from {int(target.min())} to {int(target.max())}; "
            f"expected 0 to {num_classes - 1}, or {IGNORE_LABEL}."
        )
    predicted = prediction.argmax(dim=1)[valid]
    return torch.bincount(target * num_classes + predicted, minlength=num_classes**2).double()


def confusion_metrics(statistics: Tensor) -> dict[str, float]:
    """Mean intersection over union and pixel accuracy of the split, in percent.

    The mean is over the classes that the target holds. LibMTL takes it over all classes. The two
    are equal where every class occurs; where a class occurs neither in target nor in prediction,
    LibMTL's is not a number.

    Args:
        statistics: [classes * classes] from `confusion_statistics`.

    Returns:
        {} without any valid label.
    """
    num_classes = round(statistics.numel() ** 0.5)
    confusion = statistics.reshape(num_classes, num_classes)
    num_target, intersection = confusion.sum(dim=1), confusion.diagonal()
    present = num_target > 0
    if not bool(present.any()):
        return {}
    union = num_target + confusion.sum(dim=0) - intersection
    return {
        "miou": 100 * float((intersection[present] / union[present]).mean()),
        "pixel_accuracy": 100 * float(intersection.sum() / confusion.sum()),
    }


def error_statistics(prediction: Tensor, target: Tensor) -> Tensor:
    """Sums over valid pixels: absolute error, relative error |p - t| / t, their number.

    Args:
        prediction, target: [rows, 1, H, W]; target 0 where invalid.

    Returns:
        [3].
    """
    valid = valid_depth(target)
    measured = target[valid].double()
    error = (prediction[valid].double() - measured).abs()
    return torch.stack([error.sum(), (error / measured).sum(), valid.sum().double()])


def error_metrics(statistics: Tensor) -> dict[str, float]:
    """Absolute and relative error, means over all valid pixels of the split; {} without any.

    Args:
        statistics: [3] from `error_statistics`.
    """
    absolute, relative, count = statistics.tolist()
    return {"abs_error": absolute / count, "rel_error": relative / count} if count else {}


def depth_statistics(prediction: Tensor, target: Tensor) -> Tensor:
    """`error_statistics`, and over the same pixels: the sum of squared errors, and how many have a
    ratio max(p / t, t / p) below 1.25, 1.25^2 and 1.25^3; a prediction that is not positive has none.

    Returns:
        [3 + 4].
    """
    valid = valid_depth(target)
    measured, predicted = target[valid].double(), prediction[valid].double()
    squares = (predicted - measured).square().sum()
    positive = predicted.clamp_min(torch.finfo(torch.float64).tiny)
    ratio = torch.maximum(positive / measured, measured / positive)
    counts = [(ratio < limit).sum().double() for limit in _RATIOS.values()]
    return torch.cat([error_statistics(prediction, target), torch.stack([squares, *counts])])


def depth_metrics(statistics: Tensor) -> dict[str, float]:
    """All metrics of depth over the valid pixels of the split; {} without any.

    Args:
        statistics: [7] from `depth_statistics`.

    Source:
        Eigen, Puhrsch, Fergus, arXiv:1406.2283, section 4.3; here the shares are in percent.
    """
    count = float(statistics[2])
    if not count:
        return {}
    squares, *within = statistics[NUM_ERROR_STATISTICS:].tolist()
    shares = {name: 100 * number / count for name, number in zip(_RATIOS, within, strict=True)}
    return {
        **error_metrics(statistics[:NUM_ERROR_STATISTICS]),
        "rmse": (squares / count) ** 0.5,
        **shares,
    }


def angle_statistics(prediction: Tensor, target: Tensor) -> Tensor:
    """Angles between predicted and true normals: a histogram, counts below the thresholds, the sum.

    Both normals are scaled to length 1 here, in float64, because the arc cosine magnifies rounding
    at small angles: an error of 5e-4 in the length of a stored half-precision vector would count as
    1.8 degrees. A zero prediction counts as 90 degrees.

    Args:
        prediction, target: [rows, 3, H, W]; target zero where invalid.

    Returns:
        [18000 + 4]: bins of `ANGLE_RESOLUTION` degrees, below 11.25, 22.5 and 30 degrees, sum of
        angles in degrees.
    """
    valid = valid_normal(target)
    true = target.movedim(1, -1)[valid].double()
    predicted = prediction.movedim(1, -1)[valid].double()
    lengths = (true.norm(dim=-1) * predicted.norm(dim=-1)).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    angles = ((true * predicted).sum(dim=-1) / lengths).clamp(-1, 1).acos().rad2deg()
    bins = (angles.nan_to_num(nan=0.0) / ANGLE_RESOLUTION).long().clamp_max(_NUM_BINS - 1)
    histogram = torch.bincount(bins, minlength=_NUM_BINS).double()
    num_within = [(angles < threshold).sum().double() for threshold in _WITHIN.values()]
    return torch.cat([histogram, torch.stack([*num_within, angles.sum()])])


def angle_metrics(statistics: Tensor) -> dict[str, float]:
    """Mean and median angle in degrees, percentages below 11.25, 22.5, 30; {} without valid pixels.

    The median of an even number of angles is the lower of the two middle ones, as in torch.median.

    Args:
        statistics: [18000 + 4] from `angle_statistics`.
    """
    histogram = statistics[:_NUM_BINS]
    *num_within, angle_sum = statistics[_NUM_BINS:].tolist()
    count = float(histogram.sum())
    if not count:
        return {}
    rank = histogram.new_tensor((count - 1) // 2)
    median_bin = int(torch.searchsorted(histogram.cumsum(0), rank, right=True))
    metrics = {
        "mean_angle": angle_sum / count,
        "median_angle": (median_bin + 0.5) * ANGLE_RESOLUTION,
    }
    within = zip(_WITHIN, num_within, strict=True)
    return metrics | {name: 100 * number / count for name, number in within}


def accuracy_statistics(prediction: Tensor, target: Tensor, top_k: int | None = None) -> Tensor:
    """The number of valid labels that were predicted correctly, and the number of valid labels.

    Args:
        prediction: [rows, classes] logits.
        target: [rows] int64, ignore -1.
        top_k: also count the labels that are among so many most likely ones.

    Returns:
        [2], or [3] with `top_k`.
    """
    valid = target != IGNORE_LABEL
    correct = (prediction.argmax(dim=1) == target) & valid
    counts = [correct.sum(), valid.sum()]
    if top_k is not None:
        likely = prediction.topk(top_k, dim=1).indices
        counts.append((likely == target[:, None]).any(dim=1).logical_and(valid).sum())
    return torch.stack(counts).double()


def accuracy_metrics(statistics: Tensor) -> dict[str, float]:
    """The percentage of correct predictions; {} without any valid label.

    Args:
        statistics: [2] or [3] from `accuracy_statistics`.
    """
    num_correct, count, *num_among = statistics.tolist()
    if not count:
        return {}
    found = {"accuracy": 100 * num_correct / count}
    if num_among:
        found["top_k_accuracy"] = 100 * num_among[0] / count
    return found
