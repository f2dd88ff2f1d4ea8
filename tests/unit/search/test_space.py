"""Search spaces and their references, checked before anything starts."""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections import Counter
from typing import Any

import pytest
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.sample import Categorical

import search_spaces
from repmtl_ray import cluster, policies, ray_compat, search
from repmtl_ray.cli import search as cli_search
from repmtl_ray.config import replace
from repmtl_ray.search.schedulers import scheduler_of
from repmtl_ray.search.space import check_rows, check_space, flatten, has_value
from tests.helpers.searches import BASE, CSA, LOGS, POLICY, TAU, TSR


def test_flatten_joins_paths_and_leaves_grids_and_domains_alone() -> None:
    grid, choice = ray_tune.grid_search([1, 2]), ray_tune.choice([3, 4])
    nested = {"regularizer": {"lambda_tsr": grid, "temperature": 0.5}, "policy.name": choice}
    assert flatten(nested) == {TSR: grid, TAU: 0.5, POLICY: choice}
    assert flatten(flatten(nested)) == flatten(nested)
    assert flatten({}) == {}


def three(_: Any) -> int:
    return 3


@pytest.mark.parametrize(
    "space",
    [
        search_spaces.paper_grid(),
        search_spaces.sensitivity(),
        search_spaces.sensitivity("csa"),
        search_spaces.joint(),
        search_spaces.joint(["EW", "PCGrad"]),
        search_spaces.small(),
        search_spaces.policies(["EW", "UW"]),
        {"regularizer": {"lambda_tsr": ray_tune.uniform(0, 1)}},
        {"epochs": ray_tune.randint(1, 4), "seed": ray_tune.sample_from(three)},
        {POLICY: "Constant", "policy.arguments.weights": ray_tune.choice([[1, 2], [2, 1]])},
        {"model.features": "pooled", "model.head": "linear"},
        {},
    ],
)
def test_spaces_whose_trials_can_all_be_done_pass(space: Any) -> None:
    check_space(BASE, space, "random")


@pytest.mark.parametrize(
    ("space", "searcher", "message"),
    [
        ({"policy.nam": "EW"}, "random", "'policy.nam' may become 'EW': .*did you mean 'name'"),
        ({"regularizer": {"lamda_tsr": 1.0}}, "random", "'regularizer.lamda_tsr'.*'lambda_tsr'"),
        (
            {POLICY: ray_tune.choice(["EW", "UWW"])},
            "random",
            "'policy.name' may become 'UWW': .*did you mean 'UW'",
        ),
        (
            {TSR: ray_tune.grid_search([0.9, -1.0])},
            "random",
            "lambda_tsr' may become -1.0: .*finite number >= 0",
        ),
        ({TSR: ray_tune.uniform(-0.5, 1.0)}, "optuna", "may become -0.5"),
        ({TAU: ray_tune.uniform(0.0, 1.0)}, "random", "may become 0.0: .*> 0"),
        ({"epochs": ray_tune.randint(0, 4)}, "random", "'epochs' may become 0"),
        ({"epochs": 2.5}, "random", "'epochs' may become 2.5: .*type int"),
        ({"batch_size": ray_tune.choice([1, 8])}, "random", "may become 1: .*CSA contrasts"),
        ({"tasks": [["depth"]]}, "random", "tasks"),
        ({"tasks": ray_tune.choice([["depth"]])}, "random", "'EW' weighs tasks"),
        ({POLICY: "Constant"}, "random", "'policy.name' may become 'Constant'.*weights"),
        (
            {TSR: ray_tune.grid_search([0.9])},
            "optuna",
            "'regularizer.lambda_tsr' is a grid, which searcher 'optuna' cannot search; use 'random'",
        ),
        ({TSR: ray_tune.choice([])}, "random", "'regularizer.lambda_tsr' has no values to choose"),
        ({TSR: ray_tune.grid_search([])}, "random", "has no values to choose from"),
    ],
)
def test_spaces_with_a_trial_that_cannot_be_done_are_refused(
    space: dict[str, Any], searcher: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"search space: .*{message}"):
        check_space(BASE, space, searcher)


def test_the_last_value_of_an_integer_range_is_not_its_upper_bound() -> None:
    experiment = replace(BASE, {"model.output_stride": None})
    check_space(experiment, {"optimizer.halve_at_epoch": ray_tune.randint(1, 5)}, "random")
    with pytest.raises(ValueError, match="'epochs' may become -3"):
        check_space(experiment, {"epochs": ray_tune.randint(-3, 0)}, "random")


@pytest.mark.parametrize("name", sorted(search_spaces.__all__))
def test_search_spaces_are_found_by_name(name: str) -> None:
    space = cli_search.search_space(name, None)
    assert space.keys() == cli_search.search_space(f"search_spaces:{name}", None).keys()
    check_space(BASE, space, "random")


@pytest.mark.parametrize("name", ["small", "joint", "policies"])
def test_policies_go_into_the_space(name: str) -> None:
    domain = cli_search.search_space(name, ["PCGrad", "GLS"])[POLICY]
    values = domain.categories if isinstance(domain, Categorical) else domain["grid_search"]
    assert list(values) == ["PCGrad", "GLS"]


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (
            "smal",
            None,
            "'smal': search_spaces has no function 'smal'; it has bounded, bounded_grid, joint",
        ),
        ("__all__", None, "no function '__all__'"),
        ("rep_mtl", None, "no function 'rep_mtl'"),
        ("no_such_module:f", None, "No module named 'no_such_module'; expected package.module"),
        (
            "repmtl_ray.storage:f",
            None,
            "has no function 'f'; it has absolute, ",
        ),
        ("paper_grid", ["EW"], "--policies: the space 'paper_grid' takes no policy names"),
    ],
)
def test_a_space_that_is_not_there_is_an_error(
    name: str, names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cli_search.search_space(name, names)


def test_constant_weights_are_drawn_from_the_simplex_for_the_number_of_tasks() -> None:
    three = replace(BASE, {"data.name": "nyuv2"})
    space = cli_search.search_space("scalarisation", None, three)
    weights = [arguments["weights"] for arguments in space["policy.arguments"].categories]
    assert {len(row) for row in weights} == {3}
    assert all(sum(row) == pytest.approx(3, rel=1e-2) and min(row) >= 0 for row in weights)
    assert weights == [
        arguments["weights"]
        for arguments in search_spaces.scalarisation(3)["policy.arguments"].categories
    ]
    check_space(three, space, "random")


def test_rows_may_have_any_value_and_are_checked() -> None:
    check_rows(BASE, {"EW": [{"policy.name": "EW", "seed": 5}]})
    no_penalty = {TSR: 0.0, CSA: 0.0, "regularizer.share": 0.1}
    with pytest.raises(ValueError, match=r"rows: 'mine': .*regularizer.share is 0.1"):
        check_rows(BASE, {"EW": [{"seed": 5}], "mine": [no_penalty]})


def test_the_papers_grid_and_sensitivity_lines() -> None:
    grid = search_spaces.paper_grid()
    assert [domain["grid_search"] for domain in grid.values()] == [[0.7, 0.9, 1.1, 1.3, 1.5]] * 2
    for which, varies, stays in (("tsr", TSR, CSA), ("csa", CSA, TSR)):
        line = search_spaces.sensitivity(which)
        assert len(line[varies]["grid_search"]) == 10
        assert line[varies]["grid_search"][0] == 0.1
        assert line[varies]["grid_search"][-1] == 1.9
        assert line[stays] == 0.9
    with pytest.raises(ValueError, match="which is 'tau'; expected 'tsr' or 'csa'"):
        search_spaces.sensitivity("tau")


@pytest.mark.parametrize("space", [search_spaces.small(), search_spaces.joint()])
def test_references_are_ew_without_penalties_with_and_without_logarithm(space: Any) -> None:
    references = cli_search.references_for(space)
    assert [reference[LOGS] for reference in references] == [False, True]
    for reference in references:
        trial = replace(BASE, reference)
        assert trial.policy.name == "EW"
        assert not trial.regularizer.active
        assert all(has_value(space[path], value) for path, value in reference.items())


@pytest.mark.parametrize(
    "space",
    [
        search_spaces.paper_grid(),
        search_spaces.policies(["EW", "UW"]),
        search_spaces.small(["UW", "GLS"]),
        {TSR: ray_tune.uniform(0, 1)},
        {POLICY: ray_tune.choice(["EW", "UW"]), TSR: ray_tune.uniform(0, 1)},
        search_spaces.small() | {LOGS: ray_tune.choice(["yes", "no"])},
    ],
    ids=["grid", "policies", "without EW", "one", "some", "other values"],
)
def test_a_space_without_their_values_has_no_references(space: Any) -> None:
    assert cli_search.references_for(space) == []


def test_a_space_that_fixes_the_logarithm_has_one_reference() -> None:
    assert cli_search.references_for(search_spaces.small() | {LOGS: True}) == [cli_search.EW_LOG]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"searcher": "grid"}, "searcher is 'grid'; expected one of 'random', 'optuna'"),
        ({"scheduler": "ASHA"}, "scheduler is 'ASHA'; expected one of 'none', 'asha', 'hyperband'"),
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"num_samples": 1, "references": [{TSR: 0.0}] * 2}, "at least the 2 references"),
        ({"max_concurrent": 0}, "max_concurrent is 0; expected at least 1"),
        ({"resume": True}, "resume needs the name"),
        ({"references": [{CSA: 0.0}]}, "references: 'regularizer.lambda_csa' is not in the search"),
        ({"references": [{TSR: 7.0}]}, "'regularizer.lambda_tsr' cannot become 7.0 in the space"),
        ({"param_space": {TSR: -1.0}}, "'regularizer.lambda_tsr' may become -1.0"),
    ],
)
def test_bad_arguments_of_tune_are_found_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    defaults = {"param_space": {TSR: ray_tune.uniform(0, 1)}}
    with pytest.raises(ValueError, match=message):
        search.tune(BASE, **defaults | arguments)


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, [[1]]), (3, [[3, 1], [3]]), (20, [[9, 3, 1], [9, 3], [9]])]
)
def test_hyperband_has_brackets_that_begin_later(epochs: int, milestones: Any) -> None:
    made = scheduler_of("hyperband", epochs, "/runs")
    brackets = ray_compat.asha_rungs(made)
    assert [[milestone for milestone, _ in rungs] for rungs in brackets] == milestones
    drawn = Counter(made.bracket_of(f"run {number}") for number in range(2000))
    assert sorted(drawn) == list(range(len(brackets)))
    for bracket in range(1, len(brackets)):
        assert drawn[bracket - 1] / drawn[bracket] == pytest.approx(math.e, rel=0.25)


def test_early_stopping_by_name() -> None:
    assert scheduler_of("none", 10, "/runs") is None
    assert isinstance(scheduler_of("asha", 10, "/runs"), ASHAScheduler)


def test_a_space_that_needs_names_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("my_spaces")
    module.mine = lambda names: {POLICY: ray_tune.choice(list(names))}
    monkeypatch.setitem(sys.modules, "my_spaces", module)
    with pytest.raises(ValueError, match="needs policies to search over; add --policies"):
        cli_search.search_space("my_spaces:mine", None)


def test_without_names_every_policy_that_trains_two_tasks_is_compared() -> None:
    compared = cli_search.search_space("policies", None)[POLICY]["grid_search"]
    left_out = set(policies.names()) - set(compared)
    needs_holdout = {"Auto-Lambda", "FORUM", "MOML"}
    assert left_out == {"COSMOS", "Constant", "Krum", "PIVRG", "TrimmedMean", "stl"} | needs_holdout


def test_every_policy_name_can_be_searched_or_says_what_it_needs() -> None:
    needy = {}
    for name in policies.names():
        with contextlib.suppress(ValueError):
            check_space(BASE, {POLICY: ray_tune.choice([name])}, "random")
            continue
        with pytest.raises(ValueError, match=f"'policy.name' may become '{name}': .*{name}"):
            check_space(BASE, {POLICY: name}, "random")
        needy[name] = True
    assert "stl" in needy
    assert {"EW", "UW", "PCGrad", "CAGrad"}.isdisjoint(needy)
