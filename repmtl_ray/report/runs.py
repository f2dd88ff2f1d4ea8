"""One training run as reports show it, whether a benchmark's record or a search's row.

Owns that common form, the gains by task, and the Pareto front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from repmtl_ray.delta import delta_p, directions
from repmtl_ray.report.records import Record

PARAMETERS = ("log losses", "lambda_tsr", "lambda_csa", "tau", "learning rate")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, from a benchmark or a search.

    Args:
        name: of this run alone.
        method: what it shares its colour with.
        parameters: by the names of `PARAMETERS`.
        metrics: by `task/metric`, as reported.
        delta: delta_p over tasks in percent; None without one.
        gains: by task, percent.
        history: one row an epoch.
        status: "done", "stopped" or "failed".
        reason: of a failure.
        seed, digest: of its configuration.
    """

    name: str
    method: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    delta: float | None
    gains: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()
    status: str = "done"
    reason: str = ""
    seed: int = 0
    digest: str = ""


def run_of_record(record: Record, base: Mapping[str, float]) -> Run:
    """A benchmark's record, with its gains over the baseline's metrics."""
    experiment = record["experiment"]
    metrics = {name: float(record["metrics"][name]) for name in base}
    return Run(
        name=f"{record['method']}, seed {record['seed']}",
        method=record["method"],
        parameters=_parameters(
            experiment["policy"]["log_losses"],
            experiment["regularizer"]["lambda_tsr"],
            experiment["regularizer"]["lambda_csa"],
            experiment["regularizer"]["temperature"],
            experiment["optimizer"]["learning_rate"],
        ),
        metrics=metrics,
        delta=delta_p(metrics, base).task,
        gains=gains(metrics, base),
        history=record["history"],
        seed=record["seed"],
        digest=record["digest"],
    )


def run_of_row(
    row: Any,
    metrics: Sequence[str],
    baseline: Mapping[str, float],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> Run:
    """A row of a search's table, with its trial's history."""
    own = {name: float(row[name]) for name in metrics if name in row and pandas.notna(row[name])}
    whole = len(own) == len(metrics)
    delta = row["delta_p_task"]
    return Run(
        name=f"trial {row['rank']}: {row['policy']}",
        method=row["policy"],
        parameters=_parameters(
            row["log_losses"],
            row["lambda_tsr"],
            row["lambda_csa"],
            row["tau"],
            row["learning_rate"],
        ),
        metrics=own,
        delta=float(delta) if pandas.notna(delta) else None,
        gains=gains(own, baseline) if whole else {},
        history=histories.get(row["trial"], ()),
        status=row["status"],
        reason=row["error"],
        seed=int(row["seed"]),
        digest=row["digest"],
    )


def _parameters(log: Any, tsr: Any, csa: Any, tau: Any, rate: Any) -> dict[str, Any]:
    return {
        "log losses": "log" if log else "plain",
        "lambda_tsr": float(tsr),
        "lambda_csa": float(csa),
        "tau": float(tau) if csa else None,
        "learning rate": float(rate),
    }


def gains(metrics: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """By task, the mean relative gain of its metrics over the baseline, in percent."""
    tasks: dict[str, dict[str, float]] = {}
    for name in directions(metrics):
        tasks.setdefault(name.rpartition("/")[0], {})[name] = metrics[name]
    return {task: delta_p(own, base).task for task, own in tasks.items()}


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the front: no other is at least as large in all and larger in one."""
    return [
        not any(
            all(o >= p for o, p in zip(other, point, strict=True)) and tuple(other) != tuple(point)
            for other in points
        )
        for point in points
    ]
