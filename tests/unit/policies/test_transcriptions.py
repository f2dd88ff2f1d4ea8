"""Policies written here against float64 transcriptions of their papers' or authors' updates.

A transcription is a class with `update(toy, step)`: the gradient at the shared parameters (flat)
and the weights of the heads' own gradients. It shares no code with the policy.
"""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from tests.helpers.passes import BATCHES_AN_EPOCH, toy_pass
from tests.helpers.policy_examples import BUSY_AGENT, make

STEPS = 6


def rows(toy: Any, losses: Any = None) -> Tensor:
    """[T, P] by autograd through the whole toy, of plain losses or a function of them."""
    losses = toy.losses if losses is None else losses
    found = [torch.autograd.grad(loss, toy.shared, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in found])


class GradNorm:
    """Equations 1 and 2 by autograd through the norms; W is the last shared layer."""

    def __init__(self, initial_losses: str = "step") -> None:
        self.theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.theta], lr=0.025)
        self.first_epoch = [] if initial_losses == "epoch" else None
        self.initial: Any = None

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        losses = toy.losses.detach()
        if self.first_epoch is not None and step < BATCHES_AN_EPOCH:
            self.first_epoch.append(losses)
            self.initial = torch.stack(self.first_epoch).mean(dim=0)
            return rows(toy).sum(dim=0), torch.ones(3)
        if self.initial is None:
            self.initial = losses
        w = 3 * self.theta.softmax(dim=0)
        last = [
            torch.autograd.grad(loss, toy.shared[-1], retain_graph=True)[0] for loss in toy.losses
        ]
        norms = torch.stack([(w[t] * last[t]).norm() for t in range(3)])
        rate = losses / self.initial
        target = norms.mean() * (rate / rate.mean()) ** 1.5
        self.adam.zero_grad()
        (norms - target.detach()).abs().sum().backward()
        weights = w.detach()
        self.adam.step()
        return weights @ rows(toy), weights


class IMTL:
    """LibMTL's two lines of algebra on scaled losses."""

    def __init__(self) -> None:
        self.s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.s], lr=0.025)

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        scales = self.s.detach().exp()
        g = rows(toy, scales * toy.losses)
        unit = g / g.norm(dim=1, keepdim=True)
        d, u = g[:1] - g[1:], unit[:1] - unit[1:]
        rest = g[0] @ u.T @ torch.linalg.inv(d @ u.T)
        alpha = torch.cat([1 - rest.sum().reshape(1), rest])
        self.adam.zero_grad()
        (self.s.exp() * toy.losses.detach() - self.s).sum().backward()
        self.adam.step()
        return alpha @ g, scales


class DBMTL:
    """LibMTL's, but the average starts at the first gradient."""

    def __init__(self, sigma: float = 0.0) -> None:
        self.sigma = sigma
        self.buffer: Any = None

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        g = rows(toy, toy.losses.log())
        beta = 0.9 / (step + 1) ** self.sigma
        self.buffer = g if self.buffer is None else g + beta * (self.buffer - g)
        norms = self.buffer.norm(dim=1)
        return sum(
            norms.max() / norms[t] * self.buffer[t] for t in range(3)
        ), 1 / toy.losses.detach()


class MetaBalance:
    """The authors' optimiser: averages that start at zero, tensor by tensor; task b is the main."""

    def __init__(self) -> None:
        self.norms = {}

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        total = []
        for index, parameter in enumerate(toy.shared):
            summed = torch.zeros_like(parameter)
            for t in (1, 0, 2):
                (g,) = torch.autograd.grad(toy.losses[t], parameter, retain_graph=True)
                self.norms[index, t] = self.norms.get((index, t), 0.0) * 0.9 + 0.1 * g.norm()
                summed += 0.7 * g * self.norms[index, 1] / self.norms[index, t] + 0.3 * g
            total.append(summed.reshape(-1))
        return torch.cat(total), torch.ones(3)


def onto_simplex(v: Any) -> Any:
    """Sorting, as in the authors' code of MoCo and MoDo."""
    ordered = v.sort(descending=True).values
    for count in range(len(v), 0, -1):
        threshold = (ordered[:count].sum() - 1) / count
        if ordered[count - 1] > threshold:
            return (v - threshold).clamp(min=0)
    raise AssertionError


class MoCo:
    """LibMTL's, or the paper's algorithm 1 (`papers`)."""

    def __init__(self, papers: bool = False) -> None:
        self.papers = papers
        self.y: Any = 0.0
        self.lambd = torch.ones(3, dtype=torch.float64) / 3

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        k = step + 1
        g = rows(toy)
        if not self.papers:
            g = g / g.norm(dim=1, keepdim=True) * toy.losses.detach()[:, None]
        self.y = self.y - 0.5 / k**0.5 * (self.y - g)
        rho = 0.2 if self.papers else 0.0
        slope = (self.y @ self.y.T + rho * torch.eye(3)) @ self.lambd
        moved = self.lambd - 0.1 / k**0.5 * slope
        self.lambd = onto_simplex(moved) if self.papers else moved.softmax(dim=0)
        return self.lambd @ self.y, torch.ones(3)


def part_rows(toy: Any, part: Any, num_parts: Any) -> Any:
    """[T, P] of the losses of rows part, part + num_parts, ...: the toy's own formula again."""
    gradients = toy.task_pass.sub_batch_gradients(num_parts)[part]
    return toy.task_pass.jacobian(gradients)


class MoDo:
    """Equations 2.9: lambda from two parts; the update from both, equally large."""

    def __init__(self) -> None:
        self.lambd = torch.ones(3, dtype=torch.float64) / 3

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        first, second = part_rows(toy, 0, 2), part_rows(toy, 1, 2)
        slope = first @ (second.T @ self.lambd) + 0.1 * self.lambd
        self.lambd = onto_simplex(self.lambd - 0.1 * slope)
        return self.lambd @ (first + second) / 2, torch.ones(3)


class SDMGrad:
    """The authors' loop."""

    def __init__(self, num_parts: int = 3) -> None:
        self.num_parts = num_parts
        self.w = torch.ones(3, dtype=torch.float64) / 3

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        first, second = part_rows(toy, 0, self.num_parts), part_rows(toy, 1, self.num_parts)
        zeta = part_rows(toy, 2, 3) if self.num_parts == 3 else rows(toy)
        gg = first @ second.T
        gg = gg / gg.diagonal().clamp(min=0).sqrt().mean() ** 2
        w = self.w.clone().requires_grad_()
        sgd = torch.optim.SGD([w], lr=10, momentum=0.5)
        for _ in range(20):
            w.grad = gg @ w.detach() + 0.3 * gg.mean(dim=1)
            sgd.step()
            w.data = onto_simplex(w.data)
        self.w = w.detach()
        return (self.w @ zeta + 0.3 * zeta.mean(dim=0)) / 1.3, torch.ones(3)


class PIVRG:
    """A x = (v / x)^(1/2) by damped Newton steps in logarithms; S anew after every epoch."""

    def __init__(self, alone: Any) -> None:
        self.alone = torch.tensor(alone, dtype=torch.float64)
        self.excess, self.seen = torch.zeros(3, dtype=torch.float64), []

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        if step and step % BATCHES_AN_EPOCH == 0:
            means = torch.stack(self.seen).mean(dim=0)
            self.excess, self.seen = 100 * (means - self.alone) / self.alone, []
        self.seen.append(toy.losses.detach())
        spread = self.excess.max() - self.excess.min()
        q = max(float(spread) / math.log(2.0), 10.0)
        v = 3 * (self.excess / q).exp() / (self.excess / q).exp().sum()
        assert v.max() / v.min() <= 2 + 1e-9
        g = rows(toy)
        combined = 3 * solved(g @ g.T, v) @ g
        return combined / combined.norm().clamp(min=1), torch.ones(3)


class FairGrad:
    """The official code: x > 0 with G x = x^(-1/2), three times, shortened to norm 1."""

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        g = rows(toy)
        combined = 3 * solved(g @ g.T, torch.ones(3)) @ g
        return combined / combined.norm().clamp(min=1), torch.ones(3)


class CAGrad:
    """The official code, rescale=1: SLSQP on the dual problem, three times, nothing shortened."""

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        g = rows(toy)
        gramian, c = (g @ g.T).numpy(), 0.4 * float(g.mean(dim=0).norm())
        found = scipy.optimize.minimize(
            lambda w: (gramian @ w).mean() + c * (w @ gramian @ w + 1e-12) ** 0.5,
            [1 / 3] * 3,
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
            tol=1e-12,
        )
        gw = torch.from_numpy(found.x) @ g
        return 3 * (g.mean(dim=0) + c * gw / gw.norm()) / (1 + 0.4**2), torch.ones(3)


def solved(gramian: Any, v: Any) -> Any:
    """x > 0 with gramian x = (v / x)^(1/2)."""
    y = torch.zeros(len(v), dtype=torch.float64)

    def residual(logs: Any) -> Any:
        return gramian @ logs.exp() - (v / logs.exp()).sqrt()

    for _ in range(100):
        step = torch.linalg.solve(torch.func.jacrev(residual)(y), residual(y))
        y = y - step / step.abs().max().clamp(min=1)
    assert residual(y).abs().max() < 1e-9
    return y.exp()


class PSMGD:
    """The authors' loop: MGDA of 3 tasks by trying all weights on a grid, kept for 3 steps."""

    def __init__(self) -> None:
        self.w: Any = None

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        g = rows(toy)
        if step % 3 == 0:
            best = torch.full((3,), 1 / 3, dtype=torch.float64)
            for size in (0.05, 0.005, 0.0005, 0.00005):
                moves = size * torch.arange(-20, 21, dtype=torch.float64)
                first, second = torch.meshgrid(best[0] + moves, best[1] + moves, indexing="ij")
                grid = torch.stack([first, second, 1 - first - second], dim=-1).reshape(-1, 3)
                grid = grid[(grid >= 0).all(dim=1)]
                best = grid[(grid @ g).norm(dim=1).argmin()]
            self.w = 3 * best
        return self.w @ g, self.w


class ExcessMTL:
    """The official loop, as LibMTL has it."""

    def __init__(self) -> None:
        self.squares: Any = 0.0
        self.first: Any = None
        self.w = torch.ones(3, dtype=torch.float64)

    def update(self, toy: Any, step: Any) -> tuple[Any, ...]:
        g = rows(toy)
        self.squares = self.squares + g**2
        excess = (g**2 / (self.squares + 1e-7).sqrt()).sum(dim=1)
        if self.first is None:
            self.first = excess
        else:
            self.w = self.w * (0.01 * excess / self.first).exp()
            self.w = self.w / self.w.sum() * 3
        return self.w @ g, self.w


CASES = [
    ("FairGrad", {}, FairGrad, {}),
    ("CAGrad", {}, CAGrad, {}),
    ("PIVRG", {"single_task_losses": [0.5, 2.0, 1.0]}, PIVRG, {"alone": [0.5, 2.0, 1.0]}),
    ("GradNorm", {}, GradNorm, {}),
    ("GradNorm", {"initial_losses": "epoch"}, GradNorm, {"initial_losses": "epoch"}),
    ("IMTL", {}, IMTL, {}),
    ("DB-MTL", {}, DBMTL, {}),
    ("DB-MTL", {"beta_sigma": 0.5}, DBMTL, {"sigma": 0.5}),
    ("MetaBalance", {"main": "b"}, MetaBalance, {}),
    ("MoCo", {}, MoCo, {}),
    ("MoCo", {"projection": "euclidean", "length": "own", "rho": 0.2}, MoCo, {"papers": True}),
    ("MoDo", {}, MoDo, {}),
    ("ExcessMTL", {}, ExcessMTL, {}),
    ("SDMGrad", {}, SDMGrad, {}),
    ("SDMGrad", {"num_parts": 2}, SDMGrad, {"num_parts": 2}),
]


@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize(("name", "arguments", "transcription", "options"), CASES)
def test_updates_are_those_of_the_transcription(
    name: str, arguments: Any, transcription: Any, options: Any, log_losses: bool
) -> None:
    reads_plain = name in ("GradNorm", "IMTL", "DB-MTL")
    # Solvers stop near the solution: least squares at 1e-8 of the sum, CAGrad's earlier.
    tolerance = {"PIVRG": 1e-4, "FairGrad": 1e-4, "CAGrad": 1e-2}.get(name, 1e-6)
    if log_losses and not reads_plain:
        pytest.skip("combines whatever gradients the run trains on")
    policy = make(name, log_losses=log_losses, **arguments)
    literal = transcription(**options)
    for step in range(STEPS):
        if step % BATCHES_AN_EPOCH == 0:
            policy.begin_epoch(step // BATCHES_AN_EPOCH)
        toy = toy_pass(3, seed=step, log_losses=log_losses, with_downstream=True)
        policy.backward(toy.task_pass)
        if step % BATCHES_AN_EPOCH == BATCHES_AN_EPOCH - 1:
            policy.end_epoch()
        expected, head_weights = literal.update(toy, step)
        torch.testing.assert_close(
            toy.finished_shared(), expected, rtol=tolerance, atol=tolerance / 10
        )
        heads = [p for head in toy.heads for p in head]
        total = sum(w * loss for w, loss in zip(head_weights, toy.losses, strict=True))
        if log_losses and not reads_plain:
            total = sum(toy.losses.log())
        for head, gradient in zip(heads, torch.autograd.grad(total, heads), strict=True):
            torch.testing.assert_close(head.grad, gradient, rtol=1e-6, atol=1e-9)


def test_pivrg_solves_its_equation_as_computed_by_hand() -> None:
    policy = make("PIVRG", 2, max_norm=0.0, combined="one")
    policy.excess = torch.tensor([10.0, -10.0], dtype=torch.float64)
    torch.testing.assert_close(
        policy.preferences(torch.arange(2)), torch.tensor([4 / 3, 2 / 3], dtype=torch.float64)
    )
    jacobian = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64))
    policy.combine(jacobian, torch.ones(2))
    assert policy.last_weights.tolist() == pytest.approx([1.013236, 0.267798], abs=1e-4)
    policy.excess.zero_()
    policy.combine(jacobian, torch.ones(2))
    assert policy.last_weights.tolist() == pytest.approx([0.894381, 0.326035], abs=1e-4)


def test_mgda_that_keeps_its_weights_is_psmgd() -> None:
    arguments = {"update_weights_every": 3, "sum_to": "tasks", "epsilon": 1e-9, "max_iters": 10_000}
    policy, literal = make("MGDA", **arguments), PSMGD()
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True)
        policy.backward(toy.task_pass)
        expected, weights = literal.update(toy, step)
        torch.testing.assert_close(toy.finished_shared(), expected, rtol=1e-2, atol=1e-3)
        total = sum(w * loss for w, loss in zip(weights, toy.losses, strict=True))
        heads = [parameter for head in toy.heads for parameter in head]
        for head, gradient in zip(heads, torch.autograd.grad(total, heads), strict=True):
            torch.testing.assert_close(head.grad, gradient, rtol=1e-2, atol=5e-3)
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    policy = make("MGDA", 2, **arguments)
    policy.combine(jacobian, torch.ones(2))
    assert policy.last_weights.tolist() == pytest.approx([1.6, 0.4])


def test_excess_mtl_of_constant_gradients_is_as_computed_by_hand() -> None:
    """LibMTL's weights stay at 1; TorchJD's first raw step leaves all the weight on one task."""
    gradients = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    official = make("ExcessMTL", 2, robust_step_size=1.0)
    for step in range(3):
        official.combine(gradients, torch.ones(2))
        # The excess risks shrink alike, because the sums of squares grow alike.
        assert official.last_weights.tolist() == pytest.approx([1.0, 1.0], abs=1e-5), step
    torchjds = make(
        "ExcessMTL",
        2,
        **{"robust_step_size": 1.0, "n_warmup_steps": 0, "sum_to": "one", "head_weights": "one"},
    )
    torchjds.combine(gradients, torch.ones(2))
    assert torchjds.last_weights.tolist() == pytest.approx([0.997527, 0.002473], abs=1e-6)
    assert torchjds.last_head_weights.tolist() == [1.0, 1.0]


class MTAdam:
    """The authors' optimiser, one parameter at a time; the penalty as a term of raw gradients."""

    def __init__(self, parameters: Any, ranks: Any) -> None:
        self.state = [
            {"m": [0.0] * 4, "v": [0.0] * 4, "norm": [None] * 4} for _ in range(len(parameters))
        ]
        self.ranks, self.step = ranks, 0

    def updates(self, toy: Any, terms: Any) -> Any:
        self.step += 1
        found = []
        for state, parameter in zip(self.state, toy.parameters, strict=True):
            denominators = []
            for t, term in enumerate(terms):
                (g,) = torch.autograd.grad(term, parameter, retain_graph=True, allow_unused=True)
                g = torch.zeros_like(parameter) if g is None else g
                if t < 3:
                    old = state["norm"][t]
                    state["norm"][t] = g.norm() if old is None else 0.9 * old + 0.1 * g.norm()
                    anchor = next(
                        (n for n in state["norm"][:3] if n is not None and n > 1e-10), 0.0
                    )
                    if state["norm"][t] > 1e-10:
                        g = self.ranks[t] * anchor * g / state["norm"][t]
                state["m"][t] = 0.9 * state["m"][t] + 0.1 * g
                state["v"][t] = 0.999 * state["v"][t] + 0.001 * g * g
                denominators.append((state["v"][t] / (1 - 0.999**self.step)).sqrt() + 1e-8)
            largest = torch.stack(denominators).amax(dim=0)
            mean = sum(state["m"][t] for t in range(len(terms))) / (1 - 0.9**self.step)
            found.append(mean / largest)
        return found


@pytest.mark.parametrize("with_penalty", [False, True])
def test_mtadam_updates_are_those_of_the_authors_optimiser(with_penalty: bool) -> None:
    ranks = [1.0, 2.0, 0.5]
    policy, literal = make("MTAdam", ranks=ranks), None
    for step in range(STEPS):
        toy = toy_pass(3, seed=step, with_downstream=True, with_penalty=with_penalty)
        literal = literal or MTAdam(toy.parameters, ranks)
        policy.backward(toy.task_pass)
        terms = [*toy.losses, *([toy.penalty] if with_penalty else [])]
        for got, expected in zip(toy.finished(), literal.updates(toy, terms), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_mtadams_anchor_is_remembered_while_it_is_absent() -> None:
    policy = make("MTAdam", 2)
    policy.backward(toy_pass(2).task_pass)
    before = policy.terms["0"].norms.clone(), policy.terms["0"].first.clone()
    toy = toy_pass(2, seed=1, absent=[0])
    policy.backward(toy.task_pass)
    assert torch.equal(policy.terms["0"].norms, before[0])
    assert torch.equal(policy.terms["0"].first, before[1])
    assert all(parameter.grad.abs().max() == 0 for parameter in toy.heads[0])
    norms = policy.terms["1"].norms
    assert policy._scales(norms, policy._anchor_norms(1))[0] == before[0][0] / norms[0]


class Agent(nn.Module):
    """The authors' SAC_Agent, with the parameters that the policy's was made with."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.ours = copy.deepcopy(ours)  # networks alone; the losses and steps are written below
        self.adams = {
            name: torch.optim.Adam(list(parameters), lr=3e-4)
            for name, parameters in (
                ("actor", self.ours.actor.parameters()),
                ("critic", self.ours.critics.parameters()),
                ("alpha", [self.ours.log_temperature]),
            )
        }
        self.alpha = 0.2

    def actor(self, state: Any) -> tuple[Any, ...]:
        hidden = self.ours.actor.body(state)
        mu = self.ours.actor.mean(hidden)
        std = self.ours.actor.log_std(hidden).clamp(-20, 2).exp()
        normal = Normal(mu, std)
        u = normal.rsample()
        correction = 2 * (torch.tensor(2.0).double().log() - u - functional.softplus(-2 * u))
        return 3 * u.softmax(dim=-1), normal.log_prob(u).sum(1, True) - correction.sum(1, True)

    def train_once(self, s: Any, a: Any, r: Any, s_prime: Any) -> None:
        with torch.no_grad():
            a_prime, log_pi = self.actor(s_prime)
            target = torch.min(*self.ours.targets(s_prime, a_prime))
            target = r + 0.99 * (target - self.alpha * log_pi)
        q1, q2 = self.ours.critics(s, a)
        self.minimise("critic", ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean())
        a, log_pi = self.actor(s)
        self.minimise("actor", (self.alpha * log_pi - torch.min(*self.ours.critics(s, a))).mean())
        self.minimise("alpha", -(self.ours.log_temperature * (log_pi - 3).detach()).mean())
        self.alpha = self.ours.log_temperature.exp().item()
        with torch.no_grad():
            pairs = zip(self.ours.critics.parameters(), self.ours.targets.parameters(), strict=True)
            for fast, slow in pairs:
                slow.copy_(0.005 * fast + 0.995 * slow)

    def minimise(self, name: str, loss: Any) -> None:
        for adam in self.adams.values():
            adam.zero_grad()
        loss.backward()
        self.adams[name].step()


def test_igbv2_draws_and_learns_as_the_authors_agent() -> None:
    policy = make("IGBv2", seed=5, **{**BUSY_AGENT, "replay_size": 8})
    agent, replay, base, last = Agent(policy.agent), [], [], None
    for step in range(10):
        epoch = step // BATCHES_AN_EPOCH
        policy.begin_epoch(epoch)
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        losses = toy.losses.detach()
        torch.manual_seed(zlib.crc32(f"policy 5 {step}".encode()))
        if epoch == 0:
            base.append(losses)
        else:
            reward = ((last[0] - losses) / torch.stack(base).mean(dim=0)).min()
            entry = (last[0], last[1], reward.reshape(1), losses)
            replay = [*replay, entry] if len(replay) < 8 else [entry, *replay[1:]]  # the 9th
            if step % 2 == 0:
                k = 1 + len(replay) / 8
                for _ in range(int(2 * k / 2)):
                    chosen = torch.randint(0, len(replay), (1, int(6 * k / 2))).squeeze(0)
                    columns = zip(*[replay[i] for i in chosen], strict=True)
                    agent.train_once(*map(torch.stack, columns))
        if epoch == 0:
            weights = 3 * torch.randn(3, dtype=torch.float64).softmax(dim=-1)
        else:
            with torch.no_grad():
                weights = agent.actor(losses[None])[0][0]
        last = (losses, weights)
        expected = weights @ rows(toy, toy.losses.log())
        torch.testing.assert_close(toy.finished_shared(), expected, rtol=1e-8, atol=1e-12)


def test_graddrop_at_the_representation_drops_signs_of_units_over_the_batch() -> None:
    """Algorithm 1 in LibMTL's words."""
    leak = [0.0, 0.3, 0.0]
    policy = make("GradDrop", gradients="representation", leak=leak)
    for step in range(3):
        toy = toy_pass(3, seed=step)
        policy.backward(toy.task_pass)
        root = torch.stack(list(toy.task_pass.saliency))  # [T, rows, units]
        grads = (root * toy.task_pass.representation.sign()).sum(1)
        p = 0.5 * (1 + grads.sum(0) / grads.abs().sum(0))
        torch.manual_seed(zlib.crc32(f"policy 0 {step}".encode()))
        u = torch.rand_like(p)
        mask = (p > u) * (grads > 0) + (p < u) * (grads < 0)
        shares = torch.tensor(leak)[:, None] + (1 - torch.tensor(leak))[:, None] * mask
        (expected,) = toy.task_pass.encoder_backward((root * shares[:, None]).sum(0))
        torch.testing.assert_close(toy.shared[0].grad, expected)


def test_group_means_are_k_means() -> None:
    from repmtl_ray.policies.go4align import group_means

    values = torch.tensor([5.0, 1.0, 1.2, 4.8, 0.8], dtype=torch.float64)
    expected = torch.tensor([4.9, 1.0, 1.0, 4.9, 1.0], dtype=torch.float64)
    torch.testing.assert_close(group_means(values, 2), expected)
    torch.testing.assert_close(group_means(values, 1), values.mean().expand(5))
    torch.testing.assert_close(group_means(values, 5), values)
    equal = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(group_means(equal, 3), equal)
