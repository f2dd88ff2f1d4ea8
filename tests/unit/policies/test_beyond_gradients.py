"""Policies that use more than gradients, against float64 transcriptions that move the parameters by
hand and differentiate again."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.runs.parameters import moved
from tests.helpers.passes import Toy, pass_of, toy_pass
from tests.helpers.policy_examples import make

STEPS = 3


def gradient_of(toy: Toy, task: int, moves: list[Tensor]) -> list[Tensor]:
    """Of a task's loss by all parameters, where they are moved; zeros for the other heads."""
    before = [parameter.data.clone() for parameter in toy.parameters]
    for parameter, move in zip(toy.parameters, moves, strict=True):
        parameter.data += move
    gradient = toy.gradients_of(toy.losses_now()[task])
    for parameter, values in zip(toy.parameters, before, strict=True):
        parameter.data = values
    return gradient


def fairgrad(rows: Tensor) -> Tensor:
    """sum_t x_t g_t with G x = x^(-1/2), by Newton steps in logarithms."""
    gramian, y = rows @ rows.T, torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(200):
        x = y.exp()
        residual = gramian @ x - x**-0.5
        slope = gramian * x + torch.diag(0.5 * x**-0.5)
        move = torch.linalg.solve(slope, residual)
        y = y - move / move.abs().max().clamp(min=1)
    return y.exp()


PLAIN: dict[str, Any] = {"combined": "one", "max_norm": 0}
"""The equation alone, without the factor and the clipping of its official code."""


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def assert_update(toy: Toy, shared: Tensor, heads: list[Tensor], tolerance: float = 1e-4) -> None:
    close = torch.testing.assert_close
    close(toy.finished_shared(), shared, rtol=tolerance, atol=tolerance / 100)
    close(flat(toy.finished()[len(toy.shared) :]), flat(heads), rtol=1e-8, atol=1e-10)


def samo_gradients(toy: Toy, step: int, radius: float, share: float, mu: float) -> list[Any]:
    num_shared = len(toy.shared)
    mean = toy.gradients_of(toy.losses_now().mean())
    gradients = []
    for task, name in enumerate("abc"):
        torch.manual_seed(zlib.crc32(f"policy 0 {step} {name}".encode()))
        draws = [torch.randn(p.numel(), dtype=torch.float64).view_as(p) for p in toy.shared]
        values = []
        for sign in (1, -1):
            for parameter, draw in zip(toy.shared, draws, strict=True):
                parameter.data += sign * mu * draw
            values.append(toy.losses_now()[task].detach())
            for parameter, draw in zip(toy.shared, draws, strict=True):
                parameter.data -= sign * mu * draw
        estimate = (values[0] - values[1]) / (2 * mu)
        v = []
        for part, draw in zip(mean, draws, strict=False):
            local = estimate * draw
            v.append(share * part + (1 - share) * part.norm() * local / local.norm())
        length = flat(v).norm()
        moves = [radius * part / length for part in v]
        own = toy.heads[task]
        first = num_shared + task * len(own)
        length = flat(mean[first : first + len(own)]).norm()
        for index in range(num_shared, len(toy.parameters)):
            is_own = first <= index < first + len(own)
            moves.append(radius * mean[index] / length if is_own else torch.zeros_like(mean[index]))
        gradients.append(gradient_of(toy, task, moves))
    return gradients


@pytest.mark.parametrize("base", ["FairGrad", "Mean"])
def test_samo_is_the_official_rule(base: str) -> None:
    arguments = PLAIN if base == "FairGrad" else {}
    policy = make(
        "SAMO", base=base, base_arguments=arguments, radius=0.3, share_global=0.4, mu=0.05
    )
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True)
        before = [parameter.data.clone() for parameter in toy.parameters]
        policy.backward(toy.task_pass)
        for parameter, values in zip(toy.parameters, before, strict=True):
            assert torch.equal(parameter, values)
        found = samo_gradients(toy, step, 0.3, 0.4, 0.05)
        rows = torch.stack([flat(gradient[: len(toy.shared)]) for gradient in found])
        is_mean = base == "Mean"
        weights = torch.full((3,), 1 / 3, dtype=torch.float64) if is_mean else fairgrad(rows)
        heads = [sum(parts) for parts in zip(*found, strict=True)][len(toy.shared) :]
        if is_mean:
            heads = [part / 3 for part in heads]
        assert_update(toy, weights @ rows, heads)


def test_the_perturbation_of_samo_is_as_computed_by_hand() -> None:
    """One tensor, g = (3, 4), z = (0, 7): v = (1.5, 4.5) of length 1e-3."""
    policy = make("SAMO", 2)
    toy = pass_of(torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64))
    policy.mu = 1.0
    mean = (torch.tensor([3.0, 4.0], dtype=torch.float64),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda part: torch.tensor([0.0, 7.0]).to(part))
        (move,) = policy._moves(toy.task_pass, 0, mean)
    assert move.tolist() == pytest.approx([3.16228e-4, 9.48683e-4], abs=1e-9)


@pytest.mark.parametrize("aggregate", ["separately", "together"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_f_mtl_is_the_official_rule(adaptive: bool, aggregate: str) -> None:
    policy = make("F-MTL", adaptive=adaptive, aggregate=aggregate, radius=0.5, base_arguments=PLAIN)
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True)
        num_shared, here, there = len(toy.shared), [], []
        for task in range(3):
            gradient = toy.gradients_of(toy.losses_now()[task])
            moves = []
            for part in (slice(0, num_shared), slice(num_shared, None)):
                sizes = [p.detach().abs() if adaptive else 1.0 for p in toy.parameters[part]]
                scaled = [size * g for size, g in zip(sizes, gradient[part], strict=True)]
                moves += [
                    0.5 * s * g / flat(scaled).norm() for s, g in zip(sizes, scaled, strict=True)
                ]
            here.append(gradient)
            there.append(gradient_of(toy, task, moves))
        policy.backward(toy.task_pass)
        first, second = (
            torch.stack([flat(gradient[:num_shared]) for gradient in gradients])
            for gradients in (here, there)
        )
        if aggregate == "together":
            expected = fairgrad(second) @ second
        else:
            expected = fairgrad(first) @ first + fairgrad(second - first) @ (second - first)
        heads = [sum(parts) for parts in zip(*there, strict=True)][num_shared:]
        assert_update(toy, expected, heads)


@pytest.mark.parametrize(("lambda_", "clip"), [(50.0, 0.1), (1e-3, 0.1), (1.0, [0.05, 0.0, 1e9])])
def test_consmtl_is_the_official_rule(lambda_: float, clip: Any) -> None:
    policy = make("ConsMTL", lambda_=lambda_, clip=clip)
    clips = clip if isinstance(clip, list) else [clip] * 3
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True)
        policy.backward(toy.task_pass)
        by_task = [toy.gradients_of(loss) for loss in toy.losses]
        rows = torch.stack([flat(gradient[: len(toy.shared)]) for gradient in by_task])
        x = fairgrad(rows)
        deltas = [torch.autograd.grad(loss, toy.root, create_graph=True)[0] for loss in toy.losses]
        delta = sum(weight * d for weight, d in zip(x, deltas, strict=True)).detach()
        heads = []
        for task, own in enumerate(toy.heads):
            main = torch.autograd.grad(toy.losses[task], own, retain_graph=True)
            pull = -lambda_ * (deltas[task] * delta).sum()
            extra = torch.autograd.grad(pull, own, retain_graph=True)
            factor = clips[task] * flat(list(main)).norm() / flat(list(extra)).norm()
            heads += [m + e * factor.clamp(max=1) for m, e in zip(main, extra, strict=True)]
        shared = 3 * x @ rows
        shared = shared / shared.norm().clamp(min=1)
        close = torch.testing.assert_close
        close(toy.finished_shared(), shared, rtol=1e-4, atol=1e-6)
        close(flat(toy.finished()[len(toy.shared) :]), flat(heads), rtol=1e-4, atol=1e-6)
    assert policy.metrics()["solver_failures"] == 0


def test_a_graph_from_before_a_look_is_differentiated_after_it() -> None:
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    loss = (weight**3).sum()
    with moved([weight], [torch.full((2,), 5.0, dtype=torch.float64)]):
        assert weight.tolist() == [6.0, 6.0]
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.tolist() == [3.0, 3.0]
