"""Equation 3: the gradient at the representation, and its misuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from repmtl_ray.saliency import channels_first, task_saliency


def two_losses(representation: Any) -> list[Any]:
    return [(representation**2).sum(), (3 * representation).exp().mean()]


def test_saliency_is_each_losses_own_gradient() -> None:
    representation = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    saliency = task_saliency(two_losses(representation), representation)
    assert saliency.shape == (2, 4, 5, 2)
    torch.testing.assert_close(saliency[0], 2 * representation)
    torch.testing.assert_close(saliency[1], 3 * (3 * representation).exp() / representation.numel())


def test_saliency_is_differentiable_and_keeps_the_losses_graph() -> None:
    representation = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    losses = two_losses(representation)
    saliency = task_saliency(losses, representation)
    (second,) = torch.autograd.grad(saliency[0].sum(), representation, retain_graph=True)
    torch.testing.assert_close(second, torch.full_like(second, 2.0))
    sum(losses).backward()
    assert representation.grad is not None


def test_a_loss_that_misses_the_representation_is_named() -> None:
    representation = torch.randn(3, 2, requires_grad=True)
    other = torch.randn(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"losses\[1\] does not depend on the representation"):
        task_saliency([representation.sum(), other.sum()], representation)
    with pytest.raises(ValueError, match=r"losses\[0\] does not depend"):
        task_saliency([torch.tensor(1.0)], representation)


def test_a_stacked_tensor_is_refused_with_the_reason() -> None:
    representation = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="expected a list of scalar losses"):
        task_saliency(torch.stack(two_losses(representation)), representation)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda z: [z.sum(dim=1)], r"losses\[0\] has shape \(3,\); expected a scalar"),
        (lambda z: [], "losses is empty"),
    ],
)
def test_malformed_losses_are_explained(losses: Callable[..., Any], message: str) -> None:
    representation = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        task_saliency(losses(representation), representation)


def test_a_representation_without_gradient_is_explained() -> None:
    with pytest.raises(ValueError, match="representation does not require grad"):
        task_saliency([torch.tensor(1.0)], torch.randn(2, 2))


def test_arrange_moves_channels_of_tokens() -> None:
    tokens = torch.randn(2, 4, 7, 5)
    assert channels_first(tokens, 2).shape == (2, 4, 5, 7)
    assert channels_first(tokens, -1).shape == (2, 4, 5, 7)
    assert channels_first(tokens, 1).shape == (2, 4, 7, 5)
