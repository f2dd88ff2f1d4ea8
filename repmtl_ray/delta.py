"""One number for many metrics: delta_p, delta_m and the mean rank; and the published results.

Owns these three comparisons of a row of metrics with a baseline or with other rows. Metrics are
named `task/metric`. Whatever else a result row holds (epoch, task/loss, delta_p_task,
average_accuracy) is not a metric and is left out.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from numbers import Real
from statistics import fmean

from repmtl_ray.config import nearest
from repmtl_ray.metrics import higher_is_better


@dataclass(frozen=True, kw_only=True)
class DeltaP:
    """Relative improvement over a baseline in percent; higher is better.

    Args:
        task: the mean over tasks of each task's mean over its metrics (equation 11).
        metric: the mean over all metrics at once (equation 12).
    """

    task: float
    metric: float


def delta_p(
    metrics: Mapping[str, float],
    baseline: Mapping[str, float],
    directions: Mapping[str, bool] | None = None,
) -> DeltaP:
    """Both delta_p of a row of metrics against a baseline.

    Args:
        metrics: by `task/metric`; all of them count.
        baseline: holds the same metrics; others are ignored.
        directions: whether higher is better, by `task/metric` or by the last part alone; None takes
            the project's metrics.

    Raises:
        ValueError: no metric at all, a metric that the baseline lacks, a value that is not finite, a
            baseline of zero, or a baseline so close to zero that the change is not finite.

    Source:
        Rep-MTL, arXiv:2507.21049, equations 11 and 12. The paper's metrics are all positive. A
        change is divided by the absolute value of the baseline, so that an improvement is positive
        for a baseline below zero too (R2, log likelihood).
    """
    gains: dict[str, list[float]] = {}
    for name, higher in _directions(metrics, directions).items():
        gains.setdefault(name.rpartition("/")[0], []).append(_gain(name, metrics, baseline, higher))
    return DeltaP(
        task=fmean(fmean(of_task) for of_task in gains.values()),
        metric=fmean(gain for of_task in gains.values() for gain in of_task),
    )


def delta_m(
    metrics: Mapping[str, float],
    baseline: Mapping[str, float],
    directions: Mapping[str, bool] | None = None,
) -> float:
    """The mean relative loss over all metrics in percent; lower is better (`last10` protocol).

    It is the negative of `DeltaP.metric`. Arguments and errors are those of `delta_p`.
    """
    return -delta_p(metrics, baseline, directions).metric


def mean_rank(
    rows: Mapping[str, Mapping[str, float]], directions: Mapping[str, bool] | None = None
) -> dict[str, float]:
    """Each row's rank, averaged over metrics. 1 is best; equal values share the mean of their ranks.

    Args:
        rows: by method; all have the same metrics.
        directions: as for `delta_p`.

    Raises:
        ValueError: rows with different metrics, none at all, or a value that is not finite.
    """
    directions_by_row = {method: _directions(row, directions) for method, row in rows.items()}
    if not rows:
        raise ValueError("mean rank: no rows to compare.")
    first, expected = next(iter(directions_by_row.items()))
    for method, own in directions_by_row.items():
        if own != expected:
            different = ", ".join(sorted(own.keys() ^ expected.keys()))
            raise ValueError(f"mean rank: {method!r} and {first!r} differ in {different}.")
    ranks: dict[str, list[float]] = {method: [] for method in rows}
    for name, higher in expected.items():
        values = {method: _value(name, row, method) for method, row in rows.items()}
        for method, value in values.items():
            better = sum(v > value if higher else v < value for v in values.values())
            equal = sum(v == value for v in values.values())
            ranks[method].append(better + (equal + 1) / 2)
    return {method: fmean(of_method) for method, of_method in ranks.items()}


def published(dataset: str) -> dict[str, dict[str, float]]:
    """The paper's tables: by method, the mean of every column (metrics and delta_p).

    Args:
        dataset: "nyuv2", "cityscapes", "office_31" or "office_home".

    Raises:
        ValueError: another name.

    Source:
        Rep-MTL, arXiv:2507.21049, tables 1, 2, 3 and 5; "Single-Task Baseline" is the baseline of
        delta_p.
    """
    table = resources.files("repmtl_ray").joinpath("published_results.csv")
    entries = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    known = sorted({entry["dataset"] for entry in entries})
    if dataset not in known:
        raise ValueError(
            f"published results of {dataset!r} are not known; {nearest(dataset, known)}"
        )
    rows: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["dataset"] == dataset and entry["mean"]:
            rows.setdefault(entry["method"], {})[entry["metric"]] = float(entry["mean"])
    return rows


def directions(row: Mapping[str, float]) -> dict[str, bool]:
    """The names of a row's metrics, in its order, with whether higher is better.

    Args:
        row: metrics and whatever else a result row holds.

    Raises:
        ValueError: no metric among them.
    """
    return _directions(row, None)


def _directions(row: Mapping[str, float], directions: Mapping[str, bool] | None) -> dict[str, bool]:
    """The row's metrics, with whether higher is better."""
    by_name = {}
    for name in row:
        task, _, last = name.rpartition("/")
        known = {last: higher_is_better(last)} if directions is None else directions
        is_up = known.get(name, known.get(last))
        if task and is_up is not None:
            by_name[name] = is_up
    if not by_name:
        raise ValueError(f"no metric among {sorted(row)}; expected names like 'depth/abs_error'.")
    return by_name


def _value(name: str, row: Mapping[str, float], whose: str) -> float:
    value = row[name]
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{whose}: {name} is {value!r}; expected a finite number.")
    return value


def _gain(
    name: str, metrics: Mapping[str, float], baseline: Mapping[str, float], higher: bool
) -> float:
    if name not in baseline:
        raise ValueError(f"the baseline has no {name}; {nearest(name, baseline)}")
    value, base = _value(name, metrics, "metrics"), _value(name, baseline, "baseline")
    if base == 0:
        raise ValueError(f"baseline: {name} is 0, and a relative change needs another number.")
    gain = (100 if higher else -100) * (value - base) / abs(base)
    if not math.isfinite(gain):
        raise ValueError(
            f"{name}: the relative change from {base} to {value} is not finite; the baseline is too "
            "close to 0 for a relative change."
        )
    return gain
