"""Policies that combine task gradients: TorchJD is the reference, and hard cases are finite."""

from __future__ import annotations

import dataclasses
import logging
import warnings
import zlib
from typing import Any

import cvxpy
import pytest
import torch
from torchjd import aggregation

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE
from repmtl_ray.policies import gramian
from tests.helpers.asserts import assert_finite
from tests.helpers.passes import pass_of, toy_pass
from tests.helpers.policy_examples import (
    BEYOND_GRADIENTS,
    EVERY_GRAMIAN_POLICY,
    GRADIENT_POLICIES,
    GRAMIAN_POLICIES,
    JACOBIAN_POLICIES,
    make,
)
from tests.helpers.runs import dense_batch, parameters_after, policy_config, small_stepper


def nash_at_norm_one(jacobian: Any) -> Any:
    """TorchJD's solution where its convex problem is well posed, scaled back and shortened to 1."""
    size = (jacobian @ jacobian.T).norm().sqrt()
    combined = aggregation.NashMTL(3, max_norm=0.0)(jacobian / size)
    return combined / combined.norm().clamp(min=1)


REFERENCES = {
    "MGDA": aggregation.MGDA,
    "PCGrad": aggregation.PCGrad,
    "GradVac": aggregation.GradVac,
    "IMTL-G": aggregation.IMTLG,
    "Aligned-MTL": aggregation.AlignedMTL,
    "PCD": aggregation.PCD,
    "Krum": lambda: aggregation.Krum(0),
    "ConFIG": aggregation.ConFIG,
    "RGW": aggregation.Random,
    "CAGrad": lambda: aggregation.CAGrad(0.4),
    "Nash-MTL": lambda: nash_at_norm_one,
    "FairGrad": lambda: aggregation.FairGrad(2.0),
    "UPGrad": aggregation.UPGrad,
    "DualProj": aggregation.DualProj,
    "GradDrop": aggregation.GradDrop,
    "TrimmedMean": lambda: aggregation.TrimmedMean(1),
    "ExcessMTL": aggregation.ExcessMTL,
}
FULL: dict[str, dict[str, Any]] = {
    "Nash-MTL": {"optim_niter": 20, "head_weights": "one"},
    "MGDA": {"head_weights": "one"},
    "FairGrad": {"combined": "one", "max_norm": 0},
    "CAGrad": {"combined": "one", "scale": 1.0},
    "ExcessMTL": {
        "robust_step_size": 1.0,
        "n_warmup_steps": 0,
        "sum_to": "one",
        "head_weights": "one",
    },
}
"""TorchJD's own form: no factor T, and heads of weight 1."""
TOLERANCE = {"FairGrad": 2e-4, "Nash-MTL": 1e-5, "GradVac": 1e-6}
"""Least squares and the convex problems stop elsewhere at another scale; epsilons are relative."""


def reference_update(aggregator: Any, jacobian: Any, step: Any) -> Any:
    """TorchJD's combination of the rows, with the draws of a policy of seed 0 at this step."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy's, on Nash-MTL's problem
        torch.manual_seed(zlib.crc32(f"policy 0 {step}".encode()))
        return aggregator(jacobian)


def assert_heads_have_weight_one(toy: Any) -> None:
    expected = [gradient for head in toy.task_pass.head_gradients for gradient in head]
    for got, gradient in zip(toy.finished()[len(toy.shared) :], expected, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("name", [*GRAMIAN_POLICIES, *JACOBIAN_POLICIES])
def test_directions_are_torchjds_on_the_full_jacobian(name: str) -> None:
    policy, aggregator = make(name, **FULL.get(name, {})), REFERENCES[name]()
    for step in range(4):
        toy = toy_pass(3, seed=step, with_downstream=True, loss_scale=3.0)
        policy.backward(toy.task_pass)
        expected = reference_update(aggregator, toy.task_pass.jacobian(), step)
        tolerance = TOLERANCE.get(name, 1e-9)
        torch.testing.assert_close(toy.finished_shared(), expected, rtol=tolerance, atol=tolerance)
        assert_heads_have_weight_one(toy)
    assert policy.metrics().get("solver_failures", 0) == 0


@pytest.mark.parametrize("name", GRAMIAN_POLICIES)
def test_at_the_representation_the_same_weights_rule_there(name: str) -> None:
    policy = make(name, gradients="representation", **FULL.get(name, {}))
    aggregator = REFERENCES[name]()
    for step in range(3):
        toy = toy_pass(3, seed=step, loss_scale=3.0)
        task_pass = toy.task_pass
        policy.backward(task_pass)
        combined = reference_update(aggregator, task_pass.representation_jacobian(), step)
        (expected,) = task_pass.encoder_backward(combined.view_as(task_pass.saliency[0]))
        tolerance = TOLERANCE.get(name, 1e-9)
        torch.testing.assert_close(toy.shared[0].grad, expected, rtol=tolerance, atol=tolerance)
        assert_heads_have_weight_one(toy)


def hard_jacobians(num_tasks: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    usual = torch.randn(num_tasks, 12, generator=generator, dtype=torch.float64)
    signs = torch.tensor([(-1.0) ** task for task in range(num_tasks)], dtype=torch.float64)
    one_zero, all_but_one_zero = usual.clone(), torch.zeros_like(usual)
    one_zero[0], all_but_one_zero[-1] = 0, usual[-1]
    return {
        "zero": torch.zeros_like(usual),
        "one zero": one_zero,
        "all but one zero": all_but_one_zero,
        "parallel": torch.outer(1 + torch.arange(num_tasks).double(), usual[0]),
        "opposed": torch.outer(signs, usual[0]),
        "nearly opposed": torch.outer(signs, usual[0]) + 1e-9 * usual,
        "rank one less": torch.cat([usual[:-1], usual[:-1].sum(dim=0, keepdim=True)]),
        "dimension one": usual[:, :1],
        "large": 1e6 * usual,
        "small": 1e-6 * usual,
        "huge": 1e15 * usual,
        "unequal": torch.logspace(-6, 6, num_tasks).double()[:, None] * usual,
    }


@pytest.mark.parametrize(
    ("num_tasks", "dtype"),
    [
        (2, torch.float64),
        (3, torch.float32),
        pytest.param(3, torch.float64, marks=pytest.mark.slow),
        pytest.param(10, torch.float64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", GRADIENT_POLICIES)
def test_hard_gradients_have_a_finite_result(name: str, num_tasks: int, dtype: Any) -> None:
    if name == "Krum" and num_tasks == 2:
        pytest.skip("needs three tasks")
    if name in BEYOND_GRADIENTS and num_tasks == 10:
        pytest.skip("they solve FairGrad's equation, which has this test")
    arguments = {"TrimmedMean": {"trim_number": 0}}.get(name, {})
    for case, jacobian in hard_jacobians(num_tasks).items():
        policy = make(name, num_tasks, **arguments)
        for _ in range(2):
            toy = pass_of(jacobian.to(dtype))
            policy.backward(toy.task_pass)
            assert_finite(toy)
            bound = 1e12 * jacobian.abs().max() + 1e-30
            assert toy.finished_shared().abs().max() <= bound, case
        if case == "zero":
            assert toy.finished_shared().abs().max() == 0


@pytest.mark.parametrize(
    "name",
    [
        "MGDA",
        "PCGrad",
        "GradVac",
        "IMTL-G",
        "IMTL",
        "Aligned-MTL",
        "ConFIG",
        "CAGrad",
        "Nash-MTL",
        "UPGrad",
        "DualProj",
        "DB-MTL",
        "GradNorm",
        "MetaBalance",
        "MTAdam",
        "MoCo",
        "MoDo",
        "SDMGrad",
    ],
)
def test_opposed_gradients_cancel(name: str) -> None:
    toy = pass_of(torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64))
    policy = make(name, 2)
    policy.backward(toy.task_pass)
    assert toy.finished_shared().abs().max() < 1e-3
    assert policy.metrics().get("solver_failures", 0) == (name == "Nash-MTL")


@pytest.mark.parametrize("name", ["FairGrad", "Nash-MTL"])
def test_a_zero_gradient_is_left_out_where_the_equation_has_no_solution(name: str) -> None:
    jacobian = torch.tensor([[1.0, 2.0, 0.0], [0.0] * 3, [0.5, -1.0, 3.0]], dtype=torch.float64)
    three, two = pass_of(jacobian), pass_of(jacobian[[0, 2]])
    policies = make(name, 3), make(name, 2)
    for policy, toy in zip(policies, (three, two), strict=True):
        policy.backward(toy.task_pass)
        assert policy.solver_failures == 0
    torch.testing.assert_close(three.finished_shared(), two.finished_shared())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nash_mtl_solves_its_equation_at_any_scale(scale: float) -> None:
    jacobian = scale * toy_pass(3).task_pass.jacobian()
    policy = make("Nash-MTL", max_norm=0, optim_niter=20)
    for _ in range(2):
        policy.backward(pass_of(jacobian).task_pass)
        weights = policy.last_weights
        torch.testing.assert_close(
            jacobian @ jacobian.T @ weights * weights, torch.ones_like(weights)
        )
    assert policy.solver_failures == 0


@pytest.mark.parametrize("name", ["MGDA", "Nash-MTL", "FairGrad", "PCD"])
def test_one_gradient_left_is_followed(name: str) -> None:
    toy = pass_of(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64), absent=[1])
    policy = make(name, 2)
    policy.backward(toy.task_pass)
    direction = toy.finished_shared()
    torch.testing.assert_close(direction / direction.norm(), toy.task_pass.saliency[0] / 5)
    assert policy.metrics().get("solver_failures", 0) == 0


SCALE_FREE = [name for name in GRAMIAN_POLICIES if name not in ("Nash-MTL", "PCD", "FairGrad")]


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_weights_do_not_depend_on_the_common_scale(name: str, scale: float) -> None:
    usual, scaled = toy_pass(3), pass_of(scale * toy_pass(3).task_pass.jacobian())
    policies = make(name), make(name)
    for policy, toy in zip(policies, (usual, scaled), strict=True):
        policy.backward(toy.task_pass)
    torch.testing.assert_close(policies[0].last_weights, policies[1].last_weights)


def test_fairgrad_solves_its_equation_at_any_scale() -> None:
    for scale in (1e-4, 1.0, 1e4):
        jacobian = scale * toy_pass(3).task_pass.jacobian()
        policy = make("FairGrad", **FULL["FairGrad"])
        policy.backward(pass_of(jacobian).task_pass)
        weights = policy.last_weights
        torch.testing.assert_close(
            jacobian @ jacobian.T @ weights, weights ** (-1 / 2), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_mgda_may_seek_its_weights_on_normalised_gradients(normalization: str) -> None:
    jacobian = toy_pass(3).task_pass.jacobian()
    losses = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    size = {"l2": jacobian.norm(dim=1), "loss": losses, "loss+": losses * jacobian.norm(dim=1)}
    policy = make("MGDA", normalization=normalization, sum_to="tasks")
    policy.backward(pass_of(jacobian, losses).task_pass)
    normalised = jacobian / size[normalization][:, None]
    expected = 3 * aggregation.MGDAWeighting()(normalised @ normalised.T)
    torch.testing.assert_close(policy.last_weights, expected)


def test_cagrad_scale_multiplies() -> None:
    jacobian = toy_pass(3).task_pass.jacobian()
    once, thrice = pass_of(jacobian), pass_of(jacobian)
    make("CAGrad", scale=1.0).backward(once.task_pass)
    make("CAGrad", scale=3.0).backward(thrice.task_pass)
    torch.testing.assert_close(thrice.finished_shared(), 3 * once.finished_shared())


def test_pcd_follows_the_primary_task() -> None:
    jacobian = toy_pass(3).task_pass.jacobian()
    named, first = pass_of(jacobian), pass_of(jacobian[[2, 0, 1]])
    make("PCD", primary="c").backward(named.task_pass)
    make("PCD").backward(first.task_pass)
    torch.testing.assert_close(named.finished_shared(), first.finished_shared())
    absent = pass_of(jacobian, absent=[2])
    policy = make("PCD", primary="c")
    policy.backward(absent.task_pass)
    assert absent.finished_shared().abs().max() == 0
    assert policy.num_averaged.sum() == 0


def test_excess_mtl_warms_up_as_torchjds() -> None:
    arguments = {**FULL["ExcessMTL"], "n_warmup_steps": 2}
    policy, aggregator = make("ExcessMTL", **arguments), aggregation.ExcessMTL(1.0, 2)
    for step in range(5):
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        expected = aggregator(toy.task_pass.jacobian())
        torch.testing.assert_close(toy.finished_shared(), expected, rtol=1e-6, atol=1e-9)


def test_momentum_of_weights_is_cr_mogm() -> None:
    policy = make("UPGrad", momentum_of_weights=0.8)
    weighting = aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(), alpha=0.8)
    for step in range(4):
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        jacobian = toy.task_pass.jacobian()
        torch.testing.assert_close(policy.last_weights, weighting(jacobian @ jacobian.T))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", GRADIENT_POLICIES)
def test_a_non_finite_gradient_is_an_error_that_names_policy_task_and_step(
    name: str, value: Any
) -> None:
    jacobian = torch.ones(3, 4, dtype=torch.float64)
    jacobian[1, 2] = value
    policy = make(name)
    policy.step = 3
    before = policy.state_dict()
    with pytest.raises(
        ValueError, match=f"policy '{name}': the gradient of task 'b' is not finite at step 4"
    ):
        policy.backward(pass_of(jacobian).task_pass)
    assert str(policy.state_dict()) == str(before)


def broken(*_args: Any, **_kwargs: Any) -> None:
    raise cvxpy.error.SolverError("no luck")


SUMS_TO_ONE = {name: FULL[name] for name in ("CAGrad", "FairGrad")}


@pytest.mark.parametrize("name", ["CAGrad", "FairGrad", "UPGrad", "DualProj", "Nash-MTL"])
def test_a_solver_failure_is_counted_and_logged_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make(name, **SUMS_TO_ONE.get(name, {}))
    policy.backward(toy_pass(3).task_pass)
    before = policy.alpha.clone() if name == "Nash-MTL" else None
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if name in ("CAGrad", "Nash-MTL"):
            patch.setattr(cvxpy.Problem, "solve", broken)
        else:
            weighting = getattr(aggregation, f"{name}Weighting")
            patch.setattr(weighting, "forward", lambda _self, gramian: gramian[0] * torch.nan)
        for step in (1, 2):
            policy.backward(toy_pass(3, seed=step).task_pass)
    assert policy.metrics()["solver_failures"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"policy '{name}'" in caplog.text
    assert "failed at step 2" in caplog.text
    if name == "Nash-MTL":
        assert torch.equal(policy.alpha, before)
    else:
        torch.testing.assert_close(policy.last_weights, torch.full_like(policy.last_weights, 1 / 3))
    resumed = make(name, **SUMS_TO_ONE.get(name, {}))
    resumed.load_state_dict(policy.state_dict())
    policy.backward(toy_pass(3, seed=3).task_pass)
    assert resumed.metrics()["solver_failures"] == policy.metrics()["solver_failures"] == 2


def test_nash_mtl_keeps_alpha_between_updates_and_shortens_to_its_norm() -> None:
    policy = make("Nash-MTL", update_weights_every=3, max_norm=0.1)
    alphas = []
    for step in range(4):
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        alphas.append(policy.alpha.clone())
        assert float(toy.finished_shared().norm()) == pytest.approx(0.1)
    assert torch.equal(alphas[0], alphas[1])
    assert torch.equal(alphas[0], alphas[2])
    assert not torch.equal(alphas[0], alphas[3])


HEADS = {
    "MGDA": {"sum_to": "tasks"},
    "Nash-MTL": {"max_norm": 0.1},
    "ExcessMTL": {"robust_step_size": 1.0},
}
"""The policies whose official code trains heads on the weighted losses."""


@pytest.mark.parametrize("name", [*HEADS, "FairGrad"])
def test_heads_follow_the_weights_that_are_asked_for(name: str) -> None:
    for head_weights in ("official", "one", "weighted"):
        arguments = HEADS.get(name, SUMS_TO_ONE.get(name, {}))
        policy = make(name, head_weights=head_weights, **arguments)
        if name == "ExcessMTL" and head_weights == "weighted":
            continue
        for step in range(3):
            toy = toy_pass(3, seed=step)
            policy.backward(toy.task_pass)
        is_weighted = head_weights == "weighted" or (head_weights == "official" and name in HEADS)
        weights = policy.last_weights if is_weighted else torch.ones(3)
        if is_weighted and name == "Nash-MTL":  # the shared gradient alone is shortened
            weights = policy.alpha
            assert float(toy.finished_shared().norm()) == pytest.approx(0.1)
        total = sum(w * loss for w, loss in zip(weights, toy.losses, strict=True))
        for parameter, expected in zip(
            toy.parameters[len(toy.shared) :],
            toy.gradients_of(total)[len(toy.shared) :],
            strict=True,
        ):
            torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("name", EVERY_GRAMIAN_POLICY)
def test_kept_weights_cost_one_backward_and_combine_the_new_gradients(name: str) -> None:
    policy, calls = make(name, update_weights_every=2), 0
    for step in range(4):
        toy = toy_pass(3, seed=step, with_downstream=True)
        backward = toy.task_pass.encoder_backward

        def counted(*arguments: Any, _backward: Any = backward) -> Any:
            nonlocal calls
            calls += 1
            return _backward(*arguments)

        before, calls = policy.kept_weights.clone(), 0
        policy.backward(dataclasses.replace(toy.task_pass, encoder_backward=counted))
        solves = step % 2 == 0
        assert calls == (3 if solves else 1)
        assert solves or torch.equal(policy.kept_weights, before)
        expected = policy.kept_weights @ toy.task_pass.jacobian()
        if policy.max_norm:
            expected = expected * (policy.max_norm / expected.norm()).clamp(max=1)
        torch.testing.assert_close(toy.finished_shared(), expected)


@pytest.mark.parametrize("penalty", ["none", "printed", "share"])
@pytest.mark.parametrize("name", [name for name in EVERY_GRAMIAN_POLICY if name != "Krum"])
def test_parameters_in_blocks_make_the_same_update(name: str, penalty: str) -> None:
    def parameters(num_blocks: int) -> torch.Tensor:
        config = policy_config(name)
        arguments = {**config.arguments, "parameter_blocks": num_blocks}
        options: dict[str, Any] = {
            "regularizer": (0.0, 0.0) if penalty == "none" else (0.9, 0.7),
            "share": 0.1 if penalty == "share" else None,
        }
        return parameters_after(ALONE, dataclasses.replace(config, arguments=arguments), options)

    # Nash-MTL's solver makes more of rounding than the others.
    torch.testing.assert_close(parameters(3), parameters(1), rtol=1e-5, atol=1e-7)


def test_a_block_of_parameters_is_all_that_is_in_memory() -> None:
    stepper = small_stepper(ALONE, policy_config("MGDA", arguments={"parameter_blocks": 3}))
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        products_of = gramian.products_of

        def counted(left: torch.Tensor, right: torch.Tensor, num_columns: int) -> torch.Tensor:
            sizes.append(left.shape[1])
            return products_of(left, right, num_columns)

        patch.setattr(gramian, "products_of", counted)
        stepper.step(dense_batch(0, ALONE), global_step=0)
    num_shared = sum(parameter.numel() for parameter in stepper.model.encoder.parameters())
    assert len(sizes) > 1
    assert sum(sizes) == num_shared


def test_blocks_of_parameters_at_the_representation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter_blocks of policy 'MGDA' is 2 with gradients"):
        policies.build(
            policy_config("MGDA", gradients="representation", arguments={"parameter_blocks": 2}),
            ["segmentation", "depth"],
        )


def test_a_task_that_was_absent_when_the_weights_were_found_makes_the_policy_solve() -> None:
    policy = make("UPGrad", update_weights_every=3)
    for step, absent in enumerate([[2], [2], [], [], []]):
        toy = toy_pass(3, seed=step, absent=absent)
        before = policy.kept_weights.clone()
        policy.backward(toy.task_pass)
        changed = not torch.equal(policy.kept_weights.nan_to_num(), before.nan_to_num())
        assert changed == (step in (0, 2, 3))
        assert not bool(policy.last_weights.isnan().any())


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "FairGrad", "GradDrop", "ExcessMTL"])
def test_normalised_gradients_are_compared_and_combined(name: str, normalize: str) -> None:
    jacobian = toy_pass(3).task_pass.jacobian()
    losses = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    size = {"l2": jacobian.norm(dim=1), "loss": losses, "loss+": losses * jacobian.norm(dim=1)}
    combined = make(name, normalize=normalize).combine(jacobian, losses)
    expected = make(name).combine(jacobian / size[normalize][:, None], losses)
    torch.testing.assert_close(combined, expected)


def test_what_is_normalised_by_a_loss_needs_one_and_no_logarithm() -> None:
    with pytest.raises(ValueError, match="policy 'UPGrad': the loss of task 'b' is -1"):
        make("UPGrad", normalize="loss").combine(torch.eye(3), torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"arguments\.normalize .* 'loss\+' with log_losses on"):
        make("UPGrad", normalize="loss+", log_losses=True)


@pytest.mark.parametrize(
    "name", ["UPGrad", "Nash-MTL", *JACOBIAN_POLICIES, "DB-MTL", "MetaBalance", "MoCo"]
)
def test_what_is_combined_may_be_multiplied_and_then_shortened(name: str) -> None:
    jacobian, losses = toy_pass(3).task_pass.jacobian(), torch.ones(3, dtype=torch.float64)
    free = make(name, max_norm=0).combine(jacobian, losses)
    times = make(name, max_norm=0, combined="tasks").combine(jacobian, losses)
    torch.testing.assert_close(times, 3 * free)
    both = make(name, combined="tasks", max_norm=float(2 * free.norm()))
    torch.testing.assert_close(both.combine(jacobian, losses), 2 * free)
    absent = make(name, max_norm=0, combined="tasks")
    present = torch.tensor([True, True, False])
    expected = 2 * make(name, max_norm=0).combine(jacobian, losses, present=present)
    torch.testing.assert_close(absent.combine(jacobian, losses, present=present), expected)


def test_graddrop_at_the_representation_has_no_scale_to_set() -> None:
    with pytest.raises(ValueError, match=r"'GradDrop': policy\.arguments\.normalize, combined"):
        make("GradDrop", gradients="representation", max_norm=1.0)


@pytest.mark.parametrize("gradients", ["parameters", "representation"])
def test_a_combined_gradient_is_shortened_and_never_lengthened(gradients: str) -> None:
    free = make("UPGrad", gradients=gradients)
    toy = toy_pass(3)
    free.backward(toy.task_pass)
    rows = toy.task_pass.jacobian()
    if gradients == "representation":
        rows = toy.task_pass.representation_jacobian()
    length = float((free.last_weights @ rows).norm())
    for max_norm, factor in ((0.5 * length, 0.5), (2 * length, 1.0)):
        clipped, other = make("UPGrad", gradients=gradients, max_norm=max_norm), toy_pass(3)
        clipped.backward(other.task_pass)
        torch.testing.assert_close(other.finished_shared(), factor * toy.finished_shared())
        assert_heads_have_weight_one(other)
