"""A small search's experiment, and how its configurations ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repmtl_ray import search
from repmtl_ray.config import DataConfig, Experiment, replace
from repmtl_ray.search import SearchResult
from repmtl_ray.search.draws import Draw, Draws
from repmtl_ray.search.run_records import Record, Run
from repmtl_ray.search.space import flatten, problem_of

BASE = Experiment(data=DataConfig(name="cityscapes"), epochs=10)
TSR, CSA, TAU = "regularizer.lambda_tsr", "regularizer.lambda_csa", "regularizer.temperature"
RATE, POLICY, LOGS = "optimizer.learning_rate", "policy.name", "policy.log_losses"
METRICS = ("segmentation/miou", "depth/abs_error")
BASELINE = {"segmentation/miou": 40.0, "depth/abs_error": 0.05}


@dataclass(frozen=True)
class Outcome:
    """How a configuration of a search ended: metrics of its last epoch, or the reason of a failure; its
    schedule by the names of runs, "run-1", "run-2", ..., if it was of a population."""

    changes: Mapping[str, Any]
    error: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    row: str = ""
    schedule: Sequence[Mapping[str, Any]] = ()


def search_result(outcomes: Sequence[Outcome], experiment: Experiment = BASE) -> SearchResult:
    """The result of a search whose configurations ended like this, in the order of their draws."""
    draws = Draws(experiment)
    records: dict[str, Record | None] = {}
    failures = {}
    for number, outcome in enumerate(outcomes, start=1):
        changes = flatten(outcome.changes)
        refused = problem_of(experiment, changes)
        name = f"run-{number}"
        run = None if refused else Run(name=name, label="", experiment=replace(experiment, changes))
        draws.draws.append(
            Draw(number=number, changes=changes, run=run, error=refused, row=outcome.row)
        )
        if outcome.error:
            failures[name] = outcome.error
        elif outcome.metrics:
            ended = outcome.metrics["epoch"] >= experiment.epochs
            records[name] = {
                "status": "done" if ended else "stopped",
                "history": [dict(outcome.metrics)],
                "checkpoint": f"/runs/{outcome.metrics['delta_p_task']}",
                **({"schedule": list(outcome.schedule)} if outcome.schedule else {}),
            }
    return search.search_result(draws, records, failures, BASELINE, "/storage/search", ())


def metrics_of(
    delta_p: float, *, epoch: int = 10, miou: float = 40.0, abs_error: float = 0.05
) -> dict[str, float]:
    return {
        "epoch": epoch,
        "segmentation/miou": miou,
        "depth/abs_error": abs_error,
        "delta_p_task": delta_p,
        "delta_p_metric": delta_p / 2,
        "global_step": 3.0,
    }


OUTCOMES = [
    Outcome({TSR: 0.1, POLICY: "EW"}, metrics=metrics_of(-2.5)),
    Outcome({TSR: 0.5, POLICY: "UWW"}),
    Outcome({TSR: 0.9, POLICY: "UW"}, error="loss is nan"),
    Outcome({TSR: 0.3, POLICY: "GLS"}, metrics=metrics_of(3.0, epoch=4, miou=41.5)),
    Outcome(
        {"regularizer": {"lambda_tsr": 0.7}, POLICY: "DWA"}, metrics=metrics_of(1.25, miou=42.0)
    ),
    Outcome({TSR: 1.1, POLICY: "RLW"}),
]
