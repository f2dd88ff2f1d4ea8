"""How well scores order samples: area under the ROC curve and average precision, exact with ties.

Owns both as functions of all scores and labels of a split. They depend on no order of the samples,
so they are the same however many workers collected them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranking_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Area under the ROC curve and average precision, in percent.

    Args:
        scores: [N], any scale; higher says more likely 1.
        labels: [N], 0 or 1.

    Returns:
        "auc" and "average_precision"; {} if either class is missing, without which neither exists.

    Source:
        The area is the Mann-Whitney statistic, in which equal scores count one half. The average
        precision is the sum over distinct scores of (R_n - R_(n-1)) P_n, as in scikit-learn; it is
        no interpolation.
    """
    distinct, group = torch.unique(scores, return_inverse=True)
    positives = torch.bincount(group[labels > 0], minlength=len(distinct)).double()
    negatives = torch.bincount(group[labels <= 0], minlength=len(distinct)).double()
    num_positive, num_negative = float(positives.sum()), float(negatives.sum())
    if not num_positive or not num_negative:
        return {}
    below = negatives.cumsum(0) - negatives / 2
    area = float((positives * below).sum()) / (num_positive * num_negative)
    found, shown = positives.flip(0), (positives + negatives).flip(0)
    precision = found.cumsum(0) / shown.cumsum(0)
    return {
        "auc": 100 * area,
        "average_precision": 100 * float((found * precision).sum()) / num_positive,
    }
