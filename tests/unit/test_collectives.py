"""What workers tell each other: values and derivatives equal those of one process that holds all
rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from repmtl_ray.collectives import ALONE, Workers, current
from repmtl_ray.penalties import csa_loss, tsr_loss
from tests.helpers.gloo import Pool


def own_rows(tensor: Any, workers: Workers, dim: int = 0) -> Any:
    return tensor.chunk(workers.size, dim=dim)[workers.rank]


def rows_and_weights() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(4, 3, dtype=torch.float64, generator=generator),
        torch.randn(4, 3, dtype=torch.float64, generator=generator),
    )


def curved(rows: Any, weights: Any, workers: Workers) -> Any:
    """A replicated scalar that mixes all rows non-linearly, through every operation."""
    mean = workers.spread(workers.total(rows.sum(dim=0)) / 4)
    own = ((rows - mean) ** 3 * weights).sum()
    everyone = workers.spread(workers.gather(rows))
    own = own + (rows @ everyone.T).sin().sum()
    return workers.total(own).exp().log1p()


def first_and_second_order(workers: Workers) -> tuple[Any, ...]:
    rows, weights = (own_rows(tensor, workers) for tensor in rows_and_weights())
    rows = rows.clone().requires_grad_()
    value = curved(rows * 0.3, weights, workers)
    (first,) = torch.autograd.grad(value, rows, create_graph=True)
    functional = workers.total((first**2 * weights).sum())
    (second,) = torch.autograd.grad(functional, rows)
    return value.detach(), first.detach(), second


@pytest.mark.parametrize("size", [2, 4])
def test_value_gradient_and_second_gradient_equal_one_process(
    pool_of: Callable[[int], Pool], size: int
) -> None:
    expected = first_and_second_order(ALONE)
    found = pool_of(size).run(first_and_second_order)
    for value, _, _ in found:
        torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=0)
    for order in (1, 2):
        torch.testing.assert_close(
            torch.cat([parts[order] for parts in found]), expected[order], rtol=1e-10, atol=1e-12
        )


def penalties(workers: Workers, saliency: Any) -> tuple[Any, ...]:
    own = own_rows(saliency, workers, dim=1).clone().requires_grad_()
    value = tsr_loss(own, workers=workers) + csa_loss(own, temperature=0.3, workers=workers)
    (first,) = torch.autograd.grad(value, own, create_graph=True)
    (second,) = torch.autograd.grad(workers.total(first.sin().sum()), own)
    return value.detach(), first.detach(), second


@pytest.mark.parametrize("gap", ["none", "sample", "worker"])
def test_penalties_are_those_of_the_global_batch(pool_of: Callable[[int], Pool], gap: str) -> None:
    saliency = torch.randn(
        2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    if gap == "sample":
        saliency[:, 3] = 0
        saliency[0, 1] = 0
    elif gap == "worker":
        saliency[:, 2:] = 0
    expected = penalties(ALONE, saliency)
    for size in (2, 4):
        found = pool_of(size).run(penalties, saliency)
        torch.testing.assert_close(found[0][0], expected[0], rtol=1e-12, atol=1e-14)
        for order in (1, 2):
            torch.testing.assert_close(
                torch.cat([parts[order] for parts in found], dim=1),
                expected[order],
                rtol=1e-9,
                atol=1e-12,
            )


def sums_in_place(workers: Workers) -> Any:
    mixed = [
        torch.full((2,), 1.0 + workers.rank),
        torch.tensor(3, dtype=torch.int64),
        torch.ones(1, 2),
    ]
    workers.total_(mixed)
    told = [torch.tensor([float(workers.rank)])]
    workers.broadcast_(told)
    return [tensor.tolist() for tensor in mixed] + [told[0].tolist()]


def test_in_place_sums_and_broadcast(pool_of: Callable[[int], Pool]) -> None:
    for result in pool_of(2).run(sums_in_place):
        assert result == [[3.0, 3.0], 6, [[2.0, 2.0]], [0.0]]


def which_workers(_workers: Any) -> Any:
    return current()


def test_current_reads_the_process_group(pool_of: Callable[[int], Pool]) -> None:
    assert pool_of(2).run(which_workers) == [Workers(0, 2), Workers(1, 2)]
    assert current() == ALONE
