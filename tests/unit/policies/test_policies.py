"""What holds for every policy: names, checks, checkpoints, penalties, absent tasks, draws."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repmtl_ray import policies, policy_names
from repmtl_ray.config import PolicyConfig
from repmtl_ray.policies.arguments import arguments_of
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.task_adam import TaskAdam
from tests.helpers.asserts import (
    assert_absent_task_is_left_out,
    assert_draws_by_seed_and_step,
    assert_finite,
    assert_penalty_is_added,
    assert_resumes,
)
from tests.helpers.passes import drive, pass_of, task_names, toy_pass
from tests.helpers.paths import ROOT
from tests.helpers.policy_examples import (
    BEYOND_GRADIENTS,
    BUSY_AGENT,
    EVERY_GRAMIAN_POLICY,
    MULTI_TASK,
    NAMES,
    OWN_GRADIENT_POLICIES,
    make,
)


def test_names() -> None:
    assert policies.names() == tuple(NAMES)


RESUMED = [
    *((name, {}) for name in MULTI_TASK),
    ("STCH", {"warmup_epochs": 1}),
    ("GradNorm", {"initial_losses": "epoch"}),
    ("IGBv2", BUSY_AGENT),
    ("MoCo", {"projection": "euclidean", "length": "own"}),
    ("SDMGrad", {"num_parts": 2}),
    ("DB-MTL", {"beta_sigma": 0.5}),
    ("STCH", {"warmup_epochs": 0, "sum_to": "one"}),
    ("ExcessMTL", {"n_warmup_steps": 2}),
    ("Nash-MTL", {"update_weights_every": 2}),
    ("MGDA", {"update_weights_every": 3}),
    ("IMTL", {"update_weights_every": 2}),
    ("LDC-MTL", {"normalization": "log"}),
    ("SAMO", {"base": "PCGrad", "base_arguments": {"momentum_of_weights": 0.9}}),
    ("F-MTL", {"base": "UW", "adaptive": False}),
    *((name, {"momentum_of_weights": 0.9}) for name in ("MGDA", "UPGrad", "GradVac", "RGW")),
]


@pytest.mark.parametrize(("name", "arguments"), RESUMED)
def test_a_policy_resumes_bit_by_bit(name: str, arguments: Any) -> None:
    assert_resumes(lambda: make(name, **arguments), 3, moments=(0, 1, 3, 4, 5), absent_at=(0, 2, 6))


@pytest.mark.parametrize(
    "name",
    [
        *["UW", "FAMO", "STCH", "PCD", "Nash-MTL", "GradVac", "GO4Align", "IGBv2", "LDC-MTL"],
        *OWN_GRADIENT_POLICIES,
        "Sel-Update",
    ],
)
def test_a_checkpoint_of_other_tasks_is_refused(name: str) -> None:
    policy = make(name, 3)
    drive(policy, range(2), 3)
    with pytest.raises(ValueError, match=rf"policy '{name}'.*resume with the tasks that wrote it"):
        make(name, 2).load_state_dict(policy.state_dict())


def test_a_checkpoint_of_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy 'DWA' remembers .* checkpoint holds .*cosines"):
        make("DWA").load_state_dict(make("GradVac").state_dict())
    with pytest.raises(ValueError, match=r"policy 'EW' remembers \[\], but"):
        make("EW").load_state_dict(make("GradVac").state_dict())


@pytest.mark.parametrize(
    "name", [name for name in MULTI_TASK if name not in ("MTAdam", "Sel-Update")]
)
def test_the_penalty_is_added(
    name: str,
) -> None:  # MTAdam: test_transcriptions.py; Sel-Update: test_sel_update.py
    assert_penalty_is_added(lambda: make(name), 3)


@pytest.mark.parametrize("name", [*EVERY_GRAMIAN_POLICY, "GradDrop"])
def test_the_penalty_is_added_at_the_representation(name: str) -> None:
    assert_penalty_is_added(lambda: make(name, gradients="representation"), 3)


@pytest.mark.parametrize(
    "name",
    [n for n in MULTI_TASK if n not in ("Mean", "RLW", "RGW", "Krum", "IGBv2", *BEYOND_GRADIENTS)],
)
def test_an_absent_task_is_left_out(name: str) -> None:
    arguments = {"TrimmedMean": {"trim_number": 0}, "STCH": {"warmup_epochs": 1}}.get(name, {})

    def make_for(tasks: Any) -> Any:
        return make(name, len(tasks), **arguments)

    assert_absent_task_is_left_out(make_for)


@pytest.mark.parametrize("name", BEYOND_GRADIENTS)
def test_an_absent_task_is_left_out_where_losses_are_linear(name: str) -> None:
    jacobian = toy_pass(3).task_pass.jacobian()
    three, two = pass_of(jacobian, absent=[2]), pass_of(jacobian[:2])
    for toy, num_tasks in ((three, 3), (two, 2)):
        make(name, num_tasks).backward(toy.task_pass)
    torch.testing.assert_close(three.finished_shared(), two.finished_shared())


@pytest.mark.parametrize("name", MULTI_TASK)
@pytest.mark.parametrize("absent", [[0], [0, 1], [0, 1, 2]])
def test_any_task_may_be_absent(name: str, absent: list[int]) -> None:
    policy = make(name)
    for step in range(3):
        toy = toy_pass(3, seed=step, absent=absent)
        policy.begin_epoch(step)
        policy.backward(toy.task_pass)
        assert_finite(toy)
        if policy.needs_losses_after_step:
            policy.after_optimizer_step(toy.task_pass.plain_losses)
        policy.end_epoch()
    assert all(value == value for value in policy.metrics().values())


@pytest.mark.parametrize("name", ["RLW", "RGW", "PCGrad", "GradVac", "GradDrop", "IGBv2", "SAMO"])
def test_draws_depend_on_seed_and_step_alone(name: str) -> None:
    assert_draws_by_seed_and_step(lambda seed: make(name, 10, seed=seed), 10)


@pytest.mark.parametrize("name", MULTI_TASK)
@pytest.mark.parametrize("num_tasks", [2, 10, 40])
def test_other_numbers_of_tasks(name: str, num_tasks: int) -> None:
    arguments = {"TrimmedMean": {"trim_number": 0}}.get(name, {})
    if name == "Krum" and num_tasks == 2:
        pytest.skip("needs three tasks")
    if name in BEYOND_GRADIENTS and num_tasks == 40:
        pytest.skip("two or more passes for each of them, and a base policy that has this test")
    policy = make(name, num_tasks, **arguments)
    for gradients in drive(policy, range(2), num_tasks):
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert policy.metrics().get("solver_failures", 0) == 0


def test_single_task_learning_is_the_gradient_of_its_loss() -> None:
    toy = toy_pass(1)
    make("stl").backward(toy.task_pass)
    for got, expected in zip(toy.finished(), toy.gradients_of(toy.losses[0]), strict=True):
        torch.testing.assert_close(got, expected)


REFUSED = [
    ({"name": "cagrad"}, 3, "policy.name is 'cagrad', which is no policy; here it is 'CAGrad'"),
    ({"name": "nash_mtl"}, 3, "here it is 'Nash-MTL'"),
    ({"name": "nashmtl"}, 3, "here it is 'Nash-MTL'"),
    ({"name": "imtl_g"}, 3, "here it is 'IMTL-G'"),
    ({"name": "aligned_mtl"}, 3, "here it is 'Aligned-MTL'"),
    ({"name": "equal"}, 3, "here it is 'EW'"),
    ({"name": "ew"}, 3, "here it is 'EW'"),
    ({"name": "uncertainty"}, 3, "here it is 'UW'"),
    ({"name": "mgda-ub"}, 3, "here it is 'MGDA' with gradients=\"representation\""),
    ({"name": "CR-MOGM"}, 3, "here it is the argument momentum_of_weights"),
    ({"name": "imtl"}, 3, "here it is 'IMTL'"),
    ({"name": "igb"}, 3, "here it is 'IGBv2'"),
    ({"name": "db_mtl"}, 3, "here it is 'DB-MTL'"),
    ({"name": "SDMGrad", "arguments": {"num_parts": 4}}, 3, "an integer >= 2 and <= 3"),
    ({"name": "MoCo", "arguments": {"projection": "l2"}}, 3, "one of 'softmax', 'euclidean'"),
    ({"name": "MetaBalance", "arguments": {"relax": 1.5}}, 3, "a finite number >= 0 and <= 1"),
    ({"name": "MTAdam", "arguments": {"anchor": "x"}}, 3, "is 'x'; expected a task's name"),
    ({"name": "MTAdam", "arguments": {"ranks": [1, 0, 1]}}, 3, "one finite number per task"),
    ({"name": "GO4Align", "arguments": {"num_groups": 0}}, 3, "expected an integer >= 1"),
    ({"name": "MoDo", "gradients": "representation"}, 3, "needs task gradients at the parameters"),
    ({"name": "zzz"}, 3, "known names: Aligned-MTL, Auto-Lambda"),
    ({"name": "UPGrad"}, 1, r"weighs tasks .*found 1 \(a\); take policy 'stl' for one task"),
    ({"name": "EW"}, 1, "take policy 'stl' for one task"),
    ({"name": "stl"}, 2, r"policy 'stl' trains one task, found 2 \(a, b\)"),
    (
        {"name": "CAGrad", "arguments": {"C": 1}},
        3,
        r"policy.arguments.C is 1, but policy 'CAGrad' takes no argument 'C'; did you mean 'c'\? "
        r"Allowed: c, scale, norm_eps, combined, normalize, .*momentum_of_weights\.",
    ),
    ({"name": "EW", "arguments": {"c": 1}}, 3, "Allowed: none"),
    (
        {"name": "CAGrad", "arguments": {"c": -1}},
        3,
        "policy 'CAGrad' is -1; expected a finite number >= 0",
    ),
    ({"name": "CAGrad", "arguments": {"c": "0.4"}}, 3, "arguments.c of policy 'CAGrad' is '0.4'"),
    ({"name": "CAGrad", "arguments": {"c": float("nan")}}, 3, "is nan; expected a finite number"),
    ({"name": "MGDA", "arguments": {"momentum_of_weights": 1}}, 3, "a finite number >= 0 and < 1"),
    (
        {"name": "Nash-MTL", "arguments": {"optim_niter": 2.5}},
        3,
        "is 2.5; expected an integer >= 1",
    ),
    ({"name": "Nash-MTL", "arguments": {"optim_niter": True}}, 3, "expected an integer >= 1"),
    ({"name": "FairGrad", "arguments": {"max_iters": 0}}, 3, "an integer >= 1 or None"),
    (
        {"name": "MGDA", "arguments": {"normalization": "l1"}},
        3,
        "one of 'none', 'l2', 'loss', 'loss\\+'",
    ),
    ({"name": "MGDA", "arguments": {"normalization": "loss"}}, 3, "'loss' with log_losses on"),
    ({"name": "PSMGD"}, 3, "here it is 'MGDA' with update_weights_every=8"),
    ({"name": "PIVRG"}, 3, "policy.arguments.single_task_losses is missing; policy 'PIVRG' needs"),
    ({"name": "PIVRG", "arguments": {"single_task_losses": [1, 0, 1]}}, 3, "task.*> 0"),
    (
        {"name": "FairGrad", "arguments": {"head_weights": "two"}},
        3,
        "'official', 'one', 'weighted'",
    ),
    ({"name": "SAMO", "arguments": {"base": "fairgrad"}}, 3, "the name of a policy"),
    ({"name": "SAMO", "arguments": {"base": "MTAdam"}}, 3, "'MTAdam', which makes the update"),
    ({"name": "F-MTL", "arguments": {"base": "SAMO"}}, 3, "'SAMO', which looks at other"),
    ({"name": "F-MTL", "arguments": {"base": "FAMO"}}, 3, "'FAMO', which needs the losses after"),
    (
        {"name": "SAMO", "arguments": {"base": "CAGrad", "base_arguments": {"C": 1}}},
        3,
        r"the base of policy 'SAMO': policy.arguments.C is 1, but policy 'CAGrad' takes no",
    ),
    ({"name": "F-MTL", "arguments": {"adaptive": "yes"}}, 3, "'yes'; expected True or False"),
    ({"name": "UPGrad", "arguments": {"update_weights_every": 0}}, 3, "an integer >= 1"),
    ({"name": "Constant"}, 3, "policy.arguments.weights is missing; policy 'Constant' needs it"),
    (
        {"name": "Constant", "arguments": {"weights": [1, 2]}},
        3,
        r"one finite number per task .*tasks: a, b, c",
    ),
    ({"name": "Constant", "arguments": {"weights": {"a": 1, "x": 2}}}, 2, "mapping by task"),
    ({"name": "Constant", "arguments": {"weights": [0, 0]}}, 2, "not all 0"),
    ({"name": "Constant", "arguments": {"weights": [-1, 2]}}, 2, ">= 0"),
    ({"name": "PBI", "arguments": {"weights": [0, 2]}}, 2, "> 0"),
    ({"name": "GradDrop", "arguments": {"leak": 2}}, 2, "<= 1"),
    ({"name": "PCD", "arguments": {"primary": "x"}}, 2, "is 'x'; expected a task's name, or None"),
    (
        {"name": "Krum"},
        2,
        "policy 'Krum': n_byzantine=0 and n_selected=1 need at least 3 tasks, found 2",
    ),
    ({"name": "Krum", "arguments": {"n_selected": 4}}, 3, "at least 4 tasks, found 3"),
    (
        {"name": "TrimmedMean"},
        2,
        "policy 'TrimmedMean': trim_number=1 needs at least 3 tasks, found 2",
    ),
    (
        {"name": "UW", "gradients": "representation"},
        3,
        "policy 'UW' cannot use it: it weighs losses",
    ),
    ({"name": "EW", "gradients": "representation"}, 3, "take one of Aligned-MTL, CAGrad"),
    (
        {"name": "ExcessMTL", "gradients": "representation"},
        3,
        "needs task gradients at the parameters",
    ),
]


@pytest.mark.parametrize(("fields", "num_tasks", "message"), REFUSED)
def test_a_wrong_configuration_is_refused_before_training(
    fields: Any, num_tasks: Any, message: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        policies.check(PolicyConfig(**fields), task_names(num_tasks))


def test_a_constructor_checks_its_arguments_too() -> None:
    with pytest.raises(ValueError, match=r"arguments\.beta of policy 'GradVac' is 1\.5; expected"):
        policies.class_of("GradVac")(tasks=("a", "b"), beta=1.5)  # type: ignore[call-arg]


NUMBERS = (
    st.integers(-3, 3) | st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([10**400])
)
VALUES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(["a", "one", "l2"])
    | st.lists(NUMBERS, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b", "c"]), NUMBERS, max_size=3)
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_values_of_arguments_make_a_policy_or_are_refused(data: Any) -> None:
    name = data.draw(st.sampled_from([n for n in MULTI_TASK if policy_names.ARGUMENTS[n]]))
    keys = st.sampled_from(policy_names.ARGUMENTS[name])
    arguments = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    refusal = ""
    try:
        policy = policies.build(name, task_names(3), **arguments)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert f"policy {name!r}" in refusal or "policy.arguments" in refusal
        return
    rules = arguments_of(type(policy))
    for key in arguments:
        value = getattr(policy, key)
        assert rules[key].rule.accept(value, policy.tasks) == value


def test_clipping_is_refused_where_there_is_no_gradient_to_clip() -> None:
    config = PolicyConfig(name="MTAdam")
    policies.check(config, task_names(2))
    with pytest.raises(ValueError, match=r"max_gradient_norm is 1\.0, but policy 'MTAdam' makes"):
        policies.check(config, task_names(2), max_gradient_norm=1.0)


@pytest.mark.parametrize("name", ["SAMO", "F-MTL"])
def test_a_share_of_gradients_at_other_parameters_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"share is 0\.1, but policy '{name}' takes task gradients"
    ):
        policies.check(PolicyConfig(name=name), task_names(2), share=0.1)


def test_arguments_by_task_may_be_a_mapping() -> None:
    policy = make("Constant", 2, weights={"b": 2, "a": 1})
    toy = toy_pass(2)
    policy.backward(toy.task_pass)
    assert policy.metrics() == {"weight/a": 1.0, "weight/b": 2.0}


@pytest.mark.parametrize(
    "fields", [{"name": "cagrad"}, {"name": "zzz"}, {"name": "CAGrad", "arguments": {"C": 1}}]
)
def test_a_wrong_name_is_refused_when_the_configuration_is_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"policy\.(name|arguments\.C) is"):
        PolicyConfig(**fields)


def test_the_table_of_names_agrees_with_the_constructors() -> None:
    signatures = {name: tuple(arguments_of(policies.class_of(name))) for name in policies.names()}
    assert signatures == dict(policy_names.ARGUMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_has_a_module_named_after_it(name: str) -> None:
    module = policies.class_of(name).__module__
    assert module == f"repmtl_ray.policies.{name.lower().replace('-', '_')}"


def test_every_other_name_leads_to_a_policy() -> None:
    for name, here in policy_names.OTHER_NAMES.items():
        with pytest.raises(ValueError, match="here it is"):
            PolicyConfig(name=name)
        assert policy_names.letters_of(name) == name
        assert here.startswith("the argument") or here.split("'")[1] in NAMES


def test_the_methods_page_has_every_policy_with_its_arguments_and_defaults() -> None:
    page = ROOT / "docs" / "methods.md"
    cells = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    # Reversed: the last table of the page, of costs, names the policies too.
    rows = {row[0].removeprefix("| "): " | ".join(row[1:]) for row in reversed(cells)}
    for name in policies.names():
        for key, argument in arguments_of(policies.class_of(name)).items():
            kinds = (GramianPolicy, JacobianPolicy)
            if all(
                argument != arguments_of(kind).get(key) for kind in kinds
            ):  # those are named once for all
                assert f"{key}={argument.default!r}" in rows[name], name


def test_torchjds_private_state_is_touched_in_one_module() -> None:
    private = re.compile(r"(?<!self)(?<!super\(\))\._[a-z]|from torchjd\.\S*\._")
    touching = [
        path.name
        for path in sorted((ROOT / "repmtl_ray" / "policies").glob("*.py"))
        if "torchjd" in path.read_text() and private.search(path.read_text())
    ]
    assert touching == ["torchjd_adapter.py"]


def test_no_policy_loads_a_solver_before_it_is_used() -> None:
    """Importing all methods and making them takes no second for cvxpy, scipy or TorchJD."""
    program = (
        "import sys\n"
        "from repmtl_ray import policies\n"
        "solvers = {'torchjd', 'cvxpy', 'scipy', 'quadprog', 'qpsolvers'}\n"
        "loaded = lambda names: {name.partition('.')[0] for name in sys.modules} & names\n"
        "assert not loaded({'torch', *solvers}), loaded({'torch', *solvers})\n"
        "assert len(policies.ready(3)) > 30\n"
        "assert all(policies.class_of(name) for name in policies.names())\n"
        "assert not loaded(solvers), loaded(solvers)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_task_adam_is_adam() -> None:
    torch.manual_seed(0)
    ours = TaskAdam(3, learning_rate=0.1, weight_decay=0.2)
    numbers = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([numbers], lr=0.1, weight_decay=0.2)
    for _ in range(4):
        numbers.grad = torch.randn(3, dtype=torch.float64)
        ours.step(numbers.grad, torch.arange(3))
        theirs.step()
    torch.testing.assert_close(ours.values, numbers.detach())
    before = ours.values
    ours.step(torch.ones(1, dtype=torch.float64), torch.tensor([1]))
    assert torch.equal(ours.values[[0, 2]], before[[0, 2]])
    assert ours.values[1] != before[1]
