"""Policies that weigh losses: their gradients are autograd's of the formula as printed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers.passes import BATCHES_AN_EPOCH, pass_of, second_losses, toy_pass
from tests.helpers.policy_examples import LOSS_POLICIES, make

STEPS = 8
PREFERENCE = [0.5, 2.0, 1.0]
ARGUMENTS = {
    "Constant": {"weights": PREFERENCE},
    "STCH": {"warmup_epochs": 1, "mu": 0.7},
    "PBI": {"weights": PREFERENCE, "reference": [0.05, 0.0, 0.02], "theta": 3},
    "COSMOS": {"weights": PREFERENCE, "lambda_": 1.5},
    "GO4Align": {"step_size": 0.3},
}


class Literal:
    """The formulas, written from the papers without TorchJD; one total a step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # s, or FAMO's w
        decay = 1e-3 if name == "FAMO" else 0.0
        rate = 0.025
        if name == "LDC-MTL":
            self.number, rate = torch.ones_like(self.number, requires_grad=True), 1e-3
        self.adam = torch.optim.Adam([self.number], lr=rate, weight_decay=decay)
        self.epochs = []  # by epoch, the losses of its batches

    def total(self, losses: Any, trained: Any, policy: Any, step: Any) -> Any:
        """The scalar whose gradient the update is; `trained` are log losses if they are on."""
        epoch, batch = divmod(step, BATCHES_AN_EPOCH)
        if batch == 0:
            self.epochs.append([])
        self.epochs[-1].append(losses.detach())
        preference = torch.tensor(PREFERENCE, dtype=torch.float64)
        match self.name:
            case "EW":
                return trained.sum()
            case "Mean":
                return trained.mean()
            case "Constant":
                return (preference * trained).sum()
            case "RLW":
                return (policy.last_weights * trained).sum()
            case "GLS":
                return losses.prod() ** (1 / 3)
            case "UW":
                return sum(
                    losses[t] / (2 * self.number[t].exp()) + self.number[t] / 2 for t in range(3)
                )
            case "UW-SO":
                inverse = (1 / losses.detach() - (1 / losses.detach()).max()).exp()
                return (inverse / inverse.sum() * losses).sum()
            case "LDC-MTL":
                s = 1 / (1 + (-self.number).exp())
                parts = [s[t] * losses[t] for t in range(3)]
                gaps = (parts[0] - parts[1]).abs() + (parts[1] - parts[2]).abs()
                return sum(parts) / s.sum().detach() + 0.01 * gaps
            case "IMTL-L":
                return sum(self.number[t].exp() * losses[t] - self.number[t] for t in range(3))
            case "DWA":
                if epoch < 2:
                    return losses.sum()
                means = [torch.stack(batches).mean(dim=0) for batches in self.epochs]
                rates = (means[epoch - 1] / means[epoch - 2] / 2.0).exp()
                return (3 * rates / rates.sum() * losses).sum()
            case "FAMO":
                z = self.number.detach().softmax(dim=0)
                c = 1 / (z / (losses.detach() + 1e-8)).sum()
                return c * (z * (losses + 1e-8).log()).sum()
            case "STCH":
                if epoch <= 1:
                    return losses.log().sum()
                nadir = torch.stack(self.epochs[1]).mean(dim=0)
                return 3 * 0.7 * ((losses / nadir) ** (1 / 0.7)).sum().log()
            case "IGBv2":  # its weights: test_transcriptions.py
                return (policy.last_weights_drawn * losses.log()).sum()
            case "GO4Align":
                return (self.go4align_weights(losses.detach()) * losses).sum()
            case "PBI":
                from_ideal = losses - torch.tensor([0.05, 0.0, 0.02], dtype=torch.float64)
                direction = preference / preference.square().sum().sqrt()
                along = (from_ideal * direction).sum()
                return along + 3 * (from_ideal - along * direction).square().sum().sqrt()
            case "COSMOS":
                product = (preference * losses).sum()
                lengths = preference.square().sum().sqrt() * losses.square().sum().sqrt()
                return product - 1.5 * product / lengths
        raise AssertionError(self.name)

    def go4align_weights(self, losses: Any) -> Any:
        """Of the official code; k-means by trying all two groups of sorted numbers."""
        self.shares = getattr(self, "shares", torch.ones(3, dtype=torch.float64) / 3)
        self.shares = self.shares * (-0.3 * losses).exp()
        self.shares = self.shares / self.shares.sum()
        weights = losses.sum() / losses * self.shares
        order = weights.argsort()
        splits = [(order[:cut], order[cut:]) for cut in (1, 2)]
        best = min(splits, key=lambda s: sum(weights[g].var(unbiased=False) * len(g) for g in s))
        for group in best:
            weights = weights.index_fill(0, group, weights[group].mean())
        return weights

    def after(self, losses: Any, second: Any) -> None:
        """What the method learns from a step."""
        if self.name in ("UW", "IMTL-L", "LDC-MTL"):
            self.adam.step()
        if self.name == "FAMO":
            fall = (losses.detach() + 1e-8).log() - (second + 1e-8).log()
            self.number.grad = torch.autograd.grad(
                (self.number.softmax(dim=0) * fall).sum(), self.number
            )[0]
            self.adam.step()


@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize("name", LOSS_POLICIES)
def test_gradients_are_those_of_the_formula(name: str, log_losses: bool) -> None:
    policy = make(name, log_losses=log_losses, **ARGUMENTS.get(name, {}))
    literal = Literal(name)
    for step in range(STEPS):
        epoch, batch = divmod(step, BATCHES_AN_EPOCH)
        if batch == 0:
            policy.begin_epoch(epoch)
        toy = toy_pass(3, seed=step, log_losses=log_losses)
        policy.backward(toy.task_pass)
        trained = toy.losses.log() if log_losses else toy.losses
        total = literal.total(toy.losses, trained, policy, step)
        if name in ("UW", "IMTL-L", "LDC-MTL"):
            (literal.number.grad,) = torch.autograd.grad(total, literal.number, retain_graph=True)
        for got, expected in zip(toy.finished(), toy.gradients_of(total), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        second = second_losses(toy, step)
        if policy.needs_losses_after_step:
            policy.after_optimizer_step(second)
        literal.after(toy.losses, second)
        if batch == BATCHES_AN_EPOCH - 1:
            policy.end_epoch()


@pytest.mark.parametrize("name", ["DWA", "STCH"])
def test_weights_change_after_the_first_epochs(name: str) -> None:
    policy = make(name, warmup_epochs=0) if name == "STCH" else make(name)
    found = []
    for epoch in range(3):
        policy.begin_epoch(epoch)
        policy.backward(toy_pass(3, seed=epoch).task_pass)
        found.append(policy.last_weights)
        policy.end_epoch()
    assert not torch.allclose(found[2], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(("sum_to", "total"), [("one", 1.0), ("tasks", 3.0)])
def test_rlw_weights_sum_to_one_or_to_the_number_of_tasks(sum_to: str, total: float) -> None:
    policy = make("RLW", sum_to=sum_to)
    policy.backward(toy_pass(3).task_pass)
    assert float(policy.last_weights.sum()) == pytest.approx(total)
    assert (policy.last_weights > 0).all()


def test_stch_may_sum_to_one() -> None:
    papers, codes = make("STCH", warmup_epochs=0, sum_to="one"), make("STCH", warmup_epochs=0)
    for policy in (papers, codes):
        policy.begin_epoch(0)
        policy.backward(toy_pass(3).task_pass)
        policy.begin_epoch(1)
        policy.backward(toy_pass(3, seed=1).task_pass)
    torch.testing.assert_close(3 * papers.last_weights, codes.last_weights)


@pytest.mark.parametrize("num_tasks", [2, 40])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_gls_neither_overflows_nor_underflows(num_tasks: int, size: float) -> None:
    losses = torch.full((num_tasks,), size, dtype=torch.float64)
    weights = make("GLS", num_tasks).combine(torch.eye(num_tasks, dtype=torch.float64), losses)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / num_tasks))


def test_gls_with_forty_losses_of_every_size() -> None:
    losses = torch.logspace(-30, 30, 40, dtype=torch.float64)
    weights = make("GLS", 40).combine(torch.eye(40, dtype=torch.float64), losses)
    logarithms = [math.log(loss) for loss in losses.tolist()]
    expected = [math.exp(sum(logarithms) / 40 - one) / 40 for one in logarithms]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


NEEDING_POSITIVE = [
    "UW",
    "IMTL-L",
    "GLS",
    "DWA",
    "FAMO",
    "STCH",
    "PBI",
    "COSMOS",
    "GO4Align",
    "IGBv2",
    "IMTL",
    "GradNorm",
    "DB-MTL",
    "MoCo",
]


@pytest.mark.parametrize("name", sorted({"RLW", *NEEDING_POSITIVE}))
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_an_error_that_names_task_and_policy(name: str, loss: Any) -> None:
    policy = make(name)
    policy.step = 6
    plain = torch.tensor([1.0, loss, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"policy '{name}': the loss of task 'b' is .* at step 7"):
        policy.backward(pass_of(torch.ones(3, 4, dtype=torch.float64), plain).task_pass)


@pytest.mark.parametrize("name", NEEDING_POSITIVE)
def test_a_negative_loss_is_an_error_and_a_zero_loss_is_not(name: str) -> None:
    policy = make(name, 2)
    assert policy.needs_positive_losses or name == "MoCo"  # that depends on its argument
    jacobian = torch.ones(2, 4, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"task 'a' is -1.* at step 1; expected a finite number >= 0"
    ):
        policy.backward(pass_of(jacobian, torch.tensor([-1.0, 1.0])).task_pass)
    jacobian[0] = 0
    toy = pass_of(jacobian, torch.tensor([0.0, 1.0]))
    for epoch in range(7):
        policy.begin_epoch(epoch)
        policy.backward(toy.task_pass)
        assert toy.finished_shared().isfinite().all()
        if policy.needs_losses_after_step:
            policy.after_optimizer_step(torch.tensor([0.0, 0.5]))
        policy.end_epoch()


def test_famo_raises_the_weight_of_the_task_that_falls_least() -> None:
    policy = make("FAMO", 2)
    toy = pass_of(torch.eye(2, dtype=torch.float64))
    for _ in range(5):
        policy.backward(toy.task_pass)
        policy.after_optimizer_step(torch.tensor([0.5, 0.99], dtype=torch.float64))
    assert policy.last_weights[1] > policy.last_weights[0]


@pytest.mark.parametrize("name", ["UW", "IMTL-L"])
def test_what_is_learnt_of_an_absent_task_does_not_move(name: str) -> None:
    policy = make(name, 3)
    policy.backward(toy_pass(3, seed=0).task_pass)
    before = policy.scales.values
    policy.backward(toy_pass(3, seed=1, absent=[1]).task_pass)
    after = policy.scales.values
    assert after[1] == before[1]
    assert (after[[0, 2]] != before[[0, 2]]).all()


def test_uw_so_of_two_losses_is_as_computed_by_hand() -> None:
    losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for temperature, first, total in ((1.0, 0.817574, 0.773638), (4.0, 0.592667, None)):
        policy = make("UW-SO", 2, temperature=temperature)
        combined = policy.combine(torch.eye(2, dtype=torch.float64), losses)
        assert combined.tolist() == pytest.approx([first, 1 - first], abs=1e-6)
        assert total is None or float(combined @ losses) == pytest.approx(total, abs=1e-6)


def test_ldc_mtl_of_two_losses_is_as_computed_by_hand() -> None:
    """Total 1.507311 at a = 1, and its slopes in a, which the first step of Adam follows."""
    policy = make("LDC-MTL", 2)
    losses = torch.tensor([2.0, 1.0], dtype=torch.float64)
    weights = policy.combine(torch.eye(2, dtype=torch.float64), losses)
    assert float(weights @ losses) == pytest.approx(1.507311, abs=1e-6)
    moments = policy.state_dict()["adam"]
    slopes = [float(moments[task]["exp_avg"]) / 0.1 for task in range(2)]
    assert slopes == pytest.approx([0.272874, 0.132505], abs=1e-6)


@pytest.mark.parametrize("normalization", ["first", "log"])
def test_ldc_mtl_normalises_losses_as_its_scripts(normalization: str) -> None:
    """The scripts of NYUv2 (first batch of training) and QM9 (first batch of every epoch)."""
    policy = make("LDC-MTL", normalization=normalization, lambda_=0.05)
    a = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam, first = torch.optim.Adam([a], lr=1e-3), torch.zeros(0)
    for step in range(STEPS):
        if step % BATCHES_AN_EPOCH == 0:
            policy.begin_epoch(step // BATCHES_AN_EPOCH)
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        if step == 0 or (normalization == "log" and step % BATCHES_AN_EPOCH == 0):
            first = toy.losses.detach()
        is_log = normalization == "log"
        scaled = (toy.losses / first).log() if is_log else toy.losses / (first / first.min())
        parts = a.sigmoid() * scaled
        total = parts.sum() / a.sigmoid().sum().detach()
        total = total + 0.05 * sum((parts[t] - parts[t + 1]).abs() for t in range(2))
        (a.grad,) = torch.autograd.grad(total, a, retain_graph=True)
        for got, expected in zip(toy.finished(), toy.gradients_of(total), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        adam.step()
