"""Policies that learn weights on other rows, against float64 transcriptions of LibMTL's loops."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.policies.moml import min_norm
from repmtl_ray.policies.task_pass import TaskPass
from tests.helpers.passes import BATCHES_AN_EPOCH, Toy, pass_of, toy_pass
from tests.helpers.policy_examples import BILEVEL, make

STEPS = 4
ROWS = {
    "train": ({"part": (0, 2)}, {"part": (1, 2)}),
    "holdout": ({}, {"holdout": True}),
}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def move_to(toy: Toy, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(toy.parameters, values, strict=True):
        parameter.data = value.clone()


class Outer:
    """The numbers a and their Adam."""

    def __init__(self) -> None:
        self.a = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.a], lr=1e-3)

    def step(self, gradient: Tensor) -> None:
        self.a.grad = gradient
        self.adam.step()


def auto_lambda(toy: Toy, outer: Outer, rows: Any) -> list[Tensor]:
    start = [parameter.data.clone() for parameter in toy.parameters]
    inner_rows, outer_rows = rows
    w = outer.a.detach().softmax(dim=0)
    gradient = toy.gradients_of(w @ toy.losses_now(**inner_rows))
    move_to(toy, [value - 0.1 * g for value, g in zip(start, gradient, strict=True)])
    d = toy.gradients_of(toy.losses_now(**outer_rows).sum())
    eps = 0.01 / flat(d).norm()
    slopes = []
    for sign in (1, -1):
        move_to(toy, [value + sign * eps * g for value, g in zip(start, d, strict=True)])
        total = outer.a.softmax(dim=0) @ toy.losses_now(**inner_rows).detach()
        slopes.append(torch.autograd.grad(total, outer.a)[0])
    move_to(toy, start)
    outer.step(-0.1 * (slopes[0] - slopes[1]) / (2 * eps))
    return toy.gradients_of(outer.a.detach().softmax(dim=0) @ toy.losses_now())


def moml(toy: Toy, outer: Outer, rows: Any) -> list[Tensor]:
    start = [parameter.data.clone() for parameter in toy.parameters]
    inner_rows, outer_rows = rows
    inner = [flat(toy.gradients_of(loss)) for loss in toy.losses_now(**inner_rows)]
    w = outer.a.softmax(dim=0)
    gradient = toy.gradients_of(w.detach() @ toy.losses_now(**inner_rows))
    move_to(toy, [value - 0.1 * g for value, g in zip(start, gradient, strict=True)])
    outer_gradients = [flat(toy.gradients_of(loss)) for loss in toy.losses_now(**outer_rows)]
    move_to(toy, start)
    slopes = []
    for of_outer in outer_gradients:
        # The loss after th - 0.1 sum_t w_t g_t changes with a through w alone.
        along = torch.stack([of_outer @ of_inner for of_inner in inner])
        slope = torch.autograd.grad(-0.1 * (w @ along), outer.a, retain_graph=True)[0]
        slopes.append(slope / slope.norm())
    shares = nearest_to_zero(torch.stack(slopes))
    combined = shares @ torch.stack(slopes)
    outer.step(combined if combined.norm() > 1e-4 else torch.zeros_like(combined))
    return toy.gradients_of(outer.a.detach().softmax(dim=0) @ toy.losses_now())


def nearest_to_zero(rows: Tensor) -> Tensor:
    """By trying all weights on ever finer grids."""
    return minimum(lambda lam: (lam @ rows).square().sum(dim=-1))


def minimum(function: Any) -> Tensor:
    best = torch.full((3,), 1 / 3, dtype=torch.float64)
    for size in (0.05, 0.005, 0.0005, 0.00005, 0.000005):
        steps = size * torch.arange(-20, 21, dtype=torch.float64)
        first, second = torch.meshgrid(best[0] + steps, best[1] + steps, indexing="ij")
        grid = torch.stack([first, second, 1 - first - second], dim=-1).reshape(-1, 3)
        grid = grid[(grid >= 0).all(dim=1)]
        best = grid[function(grid).argmin()]
    return best


@pytest.mark.parametrize("rows", ["train", "holdout"])
@pytest.mark.parametrize(("name", "literal"), [("Auto-Lambda", auto_lambda), ("MOML", moml)])
def test_weights_and_updates_are_libmtls(name: str, literal: Any, rows: str) -> None:
    policy, outer = make(name, outer=rows), Outer()
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True)
        before = [parameter.data.clone() for parameter in toy.parameters]
        policy.backward(toy.task_pass)
        for parameter, values in zip(toy.parameters, before, strict=True):
            assert torch.equal(parameter, values)
        expected = literal(toy, outer, ROWS[rows])
        for got, gradient in zip(toy.finished(), expected, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-7)
    assert policy.last_weights.tolist() == pytest.approx(outer.a.softmax(dim=0).tolist(), abs=1e-5)
    if (name, rows) != ("MOML", "train"):  # there no direction lowers all outer losses
        assert policy.last_weights.max() - policy.last_weights.min() > 1e-4


@pytest.mark.parametrize("rows", ["train", "holdout"])
def test_forum_is_libmtls(rows: str) -> None:
    policy, outer = make("FORUM", outer=rows, inner_steps=3), Outer()
    inner_rows, outer_rows = ROWS[rows]
    lam = torch.full((3,), 1 / 3, dtype=torch.float64)
    for step in range(STEPS):
        epoch = step // BATCHES_AN_EPOCH
        policy.begin_epoch(epoch)
        toy = toy_pass(3, seed=step, with_downstream=True)
        policy.backward(toy.task_pass)
        start = [parameter.data.clone() for parameter in toy.parameters]
        w = outer.a.softmax(dim=0)
        first = toy.gradients_of(w.detach() @ toy.losses_now(**inner_rows))
        of_a = torch.autograd.grad(
            w @ toy.losses_now(**inner_rows).detach(), outer.a, retain_graph=True
        )[0]
        for _ in range(3):
            gradient = toy.gradients_of(w.detach() @ toy.losses_now(**inner_rows))
            values = [p.data - 0.1 * g for p, g in zip(toy.parameters, gradient, strict=True)]
            move_to(toy, values)
        of_a = of_a - torch.autograd.grad(w @ toy.losses_now(**inner_rows).detach(), outer.a)[0]
        move_to(toy, start)
        q = torch.cat([of_a, flat(first)])
        rows_of_outer = []
        for loss in toy.losses_now(**outer_rows):
            of_loss = flat(toy.gradients_of(loss))
            rows_of_outer.append(torch.cat([torch.zeros(3).double(), of_loss / of_loss.norm()]))
        f = torch.stack(rows_of_outer)
        pi = 0.1 - f @ q / (q @ q + 1e-8)

        def objective(lam: Tensor, f: Tensor = f, q: Tensor = q, pi: Tensor = pi) -> Tensor:
            """The minimum over nu, which is a parabola cut off at lam . pi."""
            along = lam @ f
            nu = torch.maximum(lam @ pi, 0.05 - along @ q / (q @ q))
            return (along + nu[:, None] * q).square().sum(dim=1) - nu * 0.1 * (q @ q)

        rate = (epoch + 1) ** -0.75
        lam = (1 - rate) * lam + rate * minimum(objective)
        nu = max(float(lam @ pi), 0.0)
        expected = lam @ f + nu * q
        outer.step(nu * of_a)
        torch.testing.assert_close(flat(toy.finished()), expected[3:], rtol=1e-3, atol=1e-4)
        assert policy.shares.tolist() == pytest.approx(lam.tolist(), abs=1e-4)
        updated = policy.weights_of(torch.arange(3)).tolist()
        assert updated == pytest.approx(outer.a.softmax(dim=0).tolist(), abs=1e-5)
    assert policy.solver_failures == 0


def test_auto_lambdas_slope_is_as_computed_by_hand() -> None:
    """Equal weights, inner gradients I, d = (1, 0.5), rate 0.1: the slope is (-0.0125, 0.0125)."""
    inner = pass_of(torch.eye(2, dtype=torch.float64)).task_pass
    outer = pass_of(torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64))).task_pass

    @contextlib.contextmanager
    def look(
        moves: Any = None, *, part: tuple[int, int] = (0, 1), holdout: bool = False
    ) -> Iterator[TaskPass]:
        if holdout:
            yield outer
        else:
            yield dataclasses.replace(inner, losses=inner.plain_losses + moves[0])

    task_pass = dataclasses.replace(inner, look=look)
    slopes = make("Auto-Lambda", 2)._slopes(task_pass, torch.arange(2), 0.1)
    assert (-0.1 * slopes).tolist() == pytest.approx([-0.0125, 0.0125])


def test_opposed_slopes_of_moml_leave_the_weights_as_they_are() -> None:
    rows = torch.tensor([[-0.025, 0.025], [0.0125, -0.0125]], dtype=torch.float64)
    assert min_norm(rows).abs().max() < 1e-12
    assert min_norm(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", BILEVEL)
def test_a_policy_that_needs_a_holdout_is_refused_without_one(name: str) -> None:
    from repmtl_ray import policies
    from repmtl_ray.config import PolicyConfig

    assert name not in policies.ready(2)
    policies.check(PolicyConfig(name=name), ["a", "b"], eval_split="holdout")
    on_training_data = PolicyConfig(name=name, arguments={"outer": "train"})
    policies.check(on_training_data, ["a", "b"], eval_split="test")
    with pytest.raises(ValueError, match=rf"'{name}' is steered .* data.eval_split is 'test'"):
        policies.check(PolicyConfig(name=name), ["a", "b"], eval_split="test")
