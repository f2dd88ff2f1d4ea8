"""What must not change an update: the tasks' order, and the units of a loss where a paper says so.

Each policy declares itself here, once.
"""

from __future__ import annotations

from typing import Any

import pytest

from repmtl_ray import policies
from repmtl_ray.config import PolicyConfig
from tests.helpers.asserts import (
    assert_loss_scale_does_not_matter,
    assert_order_of_tasks_does_not_matter,
)
from tests.helpers.policy_examples import BEYOND_GRADIENTS, MULTI_TASK, SHORT, make

DEPENDS_ON_ORDER = {
    "RLW": "draws a number for each task in turn",
    "RGW": "draws a number for each task in turn",
    "IGBv2": "draws a number for each task in turn, and its networks know tasks by place",
    "LDC-MTL": "compares neighbours",
    "PCGrad": "draws the order of projections",
    "GradVac": "draws the order of corrections",
    "Krum": "of three gradients two are each other's nearest: a tie, which the first one wins",
}
NAMED: dict[str, dict[str, Any]] = {
    "Constant": {"weights": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "COSMOS": {"weights": {"a": 0.5, "b": 2.0, "c": 1.0}, "lambda_": 1.5},
    "PBI": {"weights": {"a": 0.5, "b": 2.0, "c": 1.0}, "theta": 3.0},
    "GradDrop": {"leak": {"a": 0.1, "b": 0.2, "c": 0.0}},
    "MTAdam": {"anchor": "b", "ranks": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "MetaBalance": {"main": "b"},
    "PCD": {"primary": "b"},
    "PIVRG": {"single_task_losses": {"a": 0.5, "b": 2.0, "c": 1.0}},
    "STCH": {"warmup_epochs": 0},
}


@pytest.mark.parametrize(
    "name", [name for name in MULTI_TASK if name not in (*DEPENDS_ON_ORDER, *BEYOND_GRADIENTS)]
)
def test_the_order_of_tasks_does_not_matter(name: str) -> None:
    arguments = {**SHORT.get(name, {}), **NAMED.get(name, {})}

    def make_for(tasks: Any) -> Any:
        return policies.build(PolicyConfig(name=name, arguments=arguments), tasks, seed=0)

    assert_order_of_tasks_does_not_matter(make_for, [2, 0, 1])


UPDATE, DIRECTION = False, True
LOSS_SCALE_FREE = {
    "EW": (UPDATE, True, {}, "sum of log losses"),
    "GLS": (DIRECTION, False, {}, "a geometric mean; its length is in the mean's units"),
    "STCH": (UPDATE, False, {"warmup_epochs": 0}, "divides by the nadir"),
    "FAMO": (DIRECTION, False, {}, "follows log losses; c is in the losses' units"),
    "IMTL-G": (DIRECTION, False, {}, "equal projections on unit gradients"),
    "ConFIG": (DIRECTION, False, {}, "unit gradients"),
    "Nash-MTL": (DIRECTION, False, {"optim_niter": 20}, "the bargaining solution's first axiom"),
    "DB-MTL": (UPDATE, False, {}, "log losses"),
    "GradNorm": (None, False, {}, "loss ratios are, norms only in the limit"),
    "IMTL-L": (None, False, {}, "only in the limit"),
    "IMTL": (DIRECTION, False, {}, "as IMTL-G, whatever its scales"),
    "MTAdam": (UPDATE, False, {"eps": 0.0}, "but for the anchor's own units, as Adam's"),
}
"""By policy: what stays (None: nothing that a few steps show), with log losses or not, arguments,
and why. All others make no such claim."""
CLAIMS = [
    pytest.param(name, *claim[:3], id=name)
    for name, claim in LOSS_SCALE_FREE.items()
    if claim[0] is not None
]


@pytest.mark.parametrize(("name", "up_to_length", "log_losses", "arguments"), CLAIMS)
def test_the_unit_of_a_loss_does_not_matter_where_the_paper_says_so(
    name: str, up_to_length: Any, log_losses: Any, arguments: Any
) -> None:
    assert_loss_scale_does_not_matter(
        lambda: make(name, log_losses=log_losses, **arguments),
        [1.0, 30.0, 0.02],
        up_to_length=up_to_length,
        log_losses=log_losses,
    )
