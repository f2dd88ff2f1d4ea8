"""The diagnostics against loops over samples and positions with the C x C matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.diagnostics import diagnose
from repmtl_ray.penalties import tsr_loss
from tests.helpers.gloo import Pool


def saliency_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def literal(saliency: Tensor, penalty: Tensor) -> dict[str, float]:
    """By the definitions, one sample and position after the other."""
    num_tasks, batch, channels = saliency.shape[:3]
    flat = saliency.reshape(num_tasks, batch, channels, -1)
    shares, entropies = [], []
    for b in range(batch):
        for i in range(flat.shape[3]):
            means = flat[:, b, :, i].mean(dim=1).abs()
            if means.sum() > 0:
                p = means / means.sum()
                shares.append(p)
                entropies.append(-sum(float(x * x.log()) for x in p if x > 0))
    mean = torch.stack(shares).mean(dim=0)
    dominance = -sum(float(x * x.log()) for x in mean if x > 0)
    values = {
        "dominance": dominance,
        "specialisation": dominance - sum(entropies) / len(entropies),
        "gradient_share": float(penalty.norm() / saliency.sum(dim=0).norm()),
    }
    for task, name in enumerate("ab"):
        cosines, ranks = [], []
        for b in range(batch):
            anchor = flat[:, b].mean(dim=2).T
            anchor_matrix, affinity = anchor @ anchor.T, flat[task, b] @ flat[task, b].T
            if affinity.norm() > 0:
                product = (affinity * anchor_matrix).sum()
                cosines.append(float(product / (affinity.norm() * anchor_matrix.norm())))
                eigenvalues = torch.linalg.eigvalsh(affinity)
                ranks.append(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum()))
        values[f"alignment/{name}"] = sum(cosines) / len(cosines)
        values[f"effective_rank/{name}"] = sum(ranks) / len(ranks)
        size = flat[task].abs().mean()
        ratio = float(flat[task].mean(dim=1).abs().mean() / size)
        values[f"channel_mean/{name}"] = math.sqrt(channels) * ratio
    return values


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (2, 4, 3, 4, 5), (2, 5, 6)])
def test_every_quantity_is_what_its_definition_says(shape: tuple[int, ...]) -> None:
    saliency = saliency_of(*shape)
    saliency[1, 0] = 0  # a sample without one task
    penalty = saliency_of(*shape).sum(dim=0)
    found = diagnose(
        saliency, ["a", "b"], task_gradient=saliency.sum(dim=0), penalty_gradient=penalty
    )
    expected = literal(saliency, penalty)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-10), name


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_small_and_large_saliencies_have_the_same_values_in_float32(scale: float) -> None:
    saliency = saliency_of(2, 3, 8, 5)
    total = saliency.sum(dim=0)
    expected = diagnose(saliency, ["a", "b"], task_gradient=total, penalty_gradient=total)
    scaled = (scale * saliency).float()
    found = diagnose(
        scaled, ["a", "b"], task_gradient=scaled.sum(dim=0), penalty_gradient=scaled.sum(dim=0)
    )
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name


def test_dominance_minus_specialisation_is_tsr_and_both_ways_to_lower_it_are_told_apart() -> None:
    positions = torch.arange(6)
    one_task = torch.tensor([1.0, 1e-3])[:, None, None, None].expand(2, 2, 4, 6)
    by_position = torch.stack([(positions < 3), (positions >= 3)]).double() + 1e-3
    specialised = by_position[:, None, None, :].expand(2, 2, 4, 6)
    values = {}
    for name, saliency in {"dominated": one_task, "specialised": specialised}.items():
        values[name] = diagnose(saliency, ["a", "b"], task_gradient=saliency)
        difference = values[name]["dominance"] - values[name]["specialisation"]
        assert float(difference) == pytest.approx(float(tsr_loss(saliency)), rel=1e-5)
        assert difference < 0.02  # both look like success to TSR
    assert values["dominated"]["specialisation"] < 1e-6
    assert values["dominated"]["dominance"] < 0.02
    assert values["specialised"]["specialisation"] > 0.65
    assert values["specialised"]["dominance"] == pytest.approx(math.log(2))


def test_the_channel_mean_of_random_signs_is_at_chance_and_of_equal_ones_is_not() -> None:
    random = diagnose(saliency_of(2, 8, 256, 40), ["a", "b"], task_gradient=saliency_of(1))
    equal = torch.ones(2, 2, 256, 4)
    assert float(random["channel_mean/a"]) == pytest.approx(1.0, abs=0.05)
    assert float(
        diagnose(equal, ["a", "b"], task_gradient=equal)["channel_mean/a"]
    ) == pytest.approx(16.0)


def test_a_batch_without_saliency_has_no_values() -> None:
    zeros = torch.zeros(2, 2, 4, 3)
    found = diagnose(zeros, ["a", "b"], task_gradient=zeros[0], penalty_gradient=zeros[0])
    assert not any(math.isfinite(float(value)) for value in found.values())


def values_on(workers: Workers) -> dict[str, float]:
    share = 4 // workers.size
    own = slice(workers.rank * share, (workers.rank + 1) * share)
    saliency = saliency_of(2, 4, 6, 5)[:, own]
    total = saliency.sum(dim=0)
    found = diagnose(
        saliency, ["a", "b"], task_gradient=total, penalty_gradient=total**2, workers=workers
    )
    return {name: float(value) for name, value in found.items()}


def test_two_workers_have_the_values_of_the_global_batch(pool_of: Callable[[int], Pool]) -> None:
    expected: Any = pytest.approx(values_on(ALONE))
    assert pool_of(2).run(values_on) == [expected, expected]
