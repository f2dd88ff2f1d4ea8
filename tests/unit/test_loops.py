"""docs/examples/loops: policies and Rep-MTL in training loops that are not this project's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repmtl_ray import NonFiniteLossError, combined_loss, policies
from repmtl_ray.collectives import Workers
from tests.helpers.gloo import Pool
from tests.helpers.own_policies import OneLength
from tests.helpers.paths import ROOT

FOLDER = ROOT / "docs" / "examples" / "loops"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages


def example(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def falls(totals: list[float]) -> bool:
    return sum(totals[-5:]) < 0.5 * sum(totals[:5])


@pytest.fixture(scope="module")
def plain() -> list[float]:
    """The sums of losses of plain PyTorch's loop."""
    return example("plain").train()[1]


def test_every_example_is_short_and_on_the_page() -> None:
    page = (ROOT / "docs" / "loops.md").read_text()
    for name in EXAMPLES:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 60, name
        assert f"docs/examples/loops/{name}.py" in page, name


def test_plain_pytorch(plain: list[float]) -> None:
    assert len(plain) == 40
    assert falls(plain)


@pytest.mark.parametrize("kind", ["Automatic", "Manual"])
def test_lightning_finds_what_plain_pytorch_finds(kind: str, plain: list[float]) -> None:
    module = example("with_lightning")
    assert module.train(getattr(module, kind))[1] == pytest.approx(plain, rel=1e-5)


def test_lightning_keeps_the_policys_state() -> None:
    module = example("with_lightning").Automatic()
    module.policy.step, checkpoint = 7, {}
    module.on_save_checkpoint(checkpoint)
    again = example("with_lightning").Automatic()
    again.on_load_checkpoint(checkpoint)
    assert again.policy.step == 7


def test_accelerate_finds_what_plain_pytorch_finds(plain: list[float]) -> None:
    assert example("with_accelerate").train()[1] == pytest.approx(plain, rel=1e-5)


def test_the_trainer_of_transformers_learns(plain: list[float], tmp_path: Path) -> None:
    totals = example("with_transformers").train(str(tmp_path))[1]
    assert len(totals) == 40
    assert falls(totals)


def test_accumulation_is_the_whole_batch_in_parts() -> None:
    module = example("accumulation")
    whole, parts = (module.train(num, 10, penalty=0.0)[1] for num in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-4)
    totals = module.train(4)[1]
    assert totals[:10] != parts
    assert falls(totals)


def test_half_precision_is_near_and_leaves_out_steps_that_overflow(plain: list[float]) -> None:
    module = example("amp")
    assert module.train()[1][:20] == pytest.approx(plain[:20], rel=0.05)
    late = module.train(scale=2.0**40)[1]
    assert 0 < len(late) < 40
    assert late[-1] < late[0]


def parallel_totals(workers: Workers) -> list[float]:
    return example("data_parallel").train()[1]


def test_two_processes_of_ddp_find_what_one_finds(
    plain: list[float], pool_of: Callable[[int], Pool]
) -> None:
    for totals in pool_of(2).run(parallel_totals):
        assert totals == pytest.approx(example("plain").train(steps=10)[1], rel=1e-4)


@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize("policy", ["UW", "FairGrad", "GradDrop", OneLength])
def test_the_gradient_of_the_combined_loss_is_the_policys(policy: Any, log_losses: bool) -> None:
    torch.manual_seed(0)
    encoder, unused = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)
    heads = [nn.Linear(4, 1, dtype=torch.float64) for _ in range(2)]
    features = encoder(torch.randn(5, 3, dtype=torch.float64))
    losses = [head(features).square().mean() + 0.1 for head in heads]
    shared = [*encoder.parameters(), *unused.parameters()]
    trained = [loss.log() if log_losses else loss for loss in losses]
    rows = torch.zeros(2, sum(p.numel() for p in shared), dtype=torch.float64)
    for row, loss in zip(rows, trained, strict=True):
        parts = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
        row[:16] = torch.cat([part.flatten() for part in parts])
    reference, used = policies.build(policy, num_tasks=2), policies.build(policy, num_tasks=2)
    expected = reference.combine(rows, torch.stack(losses).detach(), log_losses=log_losses)
    weights = reference.last_head_weights
    of_heads = [
        torch.autograd.grad(weight * loss, list(head.parameters()), retain_graph=True)
        for weight, loss, head in zip(weights, trained, heads, strict=True)
    ]
    total = combined_loss(used, losses, shared, log_losses=log_losses, scale=8.0)
    torch.testing.assert_close(total, (weights * torch.stack(trained)).sum())
    total.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in shared]), expected)
    for head, gradients in zip(heads, of_heads, strict=True):
        torch.testing.assert_close([p.grad for p in head.parameters()], list(gradients))
    assert used.step == reference.step == 1


def test_a_gradient_that_is_not_finite_makes_no_step() -> None:
    weight = torch.ones(2, requires_grad=True)
    policy = policies.build("FairGrad", num_tasks=2)
    with pytest.raises(NonFiniteLossError, match="'FairGrad': the gradient of task 'task_1'"):
        combined_loss(policy, [weight.sum(), (weight - 1).sqrt().sum()], [weight])
    assert policy.step == 0
