"""TSR and CSA: properties, the literal equations in float64, the numerics that a naive version gets
wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repmtl_ray import affinities
from repmtl_ray.penalties import csa_loss, divergence_loss, tsr_loss
from repmtl_ray.regularizers import RepMTL
from tests.helpers.literal import literal_csa, literal_tsr

SHAPES = [(2, 3, 8, 5), (3, 4, 6, 1), (2, 2, 4, 3, 3), (3, 4, 6), (2, 3, 4, 9), (2, 2, 3, 2, 2, 2)]


def csa_by_samples(saliency: Any, **options: Any) -> Any:
    """As `csa_loss` computes saliencies that are too large to be read at once."""
    with mock.patch.object(affinities, "LARGEST_WHOLE", saliency.numel() // 3):
        return csa_loss(saliency, **options)


PENALTIES = {
    "tsr": (tsr_loss, literal_tsr),
    "csa": (lambda s: csa_loss(s, temperature=0.3), lambda s: literal_csa(s, 0.3)),
    "csa by samples": (
        lambda s: csa_by_samples(s, temperature=0.3),
        lambda s: literal_csa(s, 0.3),
    ),
}


def random_saliency(shape: Any, dtype: Any = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def value_and_derivatives(penalty: Any, saliency: Any) -> tuple[Any, ...]:
    """The value, its gradient, and the gradient of a fixed functional of that gradient."""
    value = penalty(saliency)
    (first,) = torch.autograd.grad(value, saliency, create_graph=True)
    probe = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
    (second,) = torch.autograd.grad((first * probe).sum(), saliency)
    return value.detach(), first.detach(), second


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PENALTIES)
def test_equals_the_printed_equations_to_second_order(name: str, shape: tuple[int, ...]) -> None:
    ours, literal = PENALTIES[name]
    saliency = random_saliency(shape)
    for found, expected in zip(
        value_and_derivatives(ours, saliency), value_and_derivatives(literal, saliency), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (3, 2, 3), (2, 2, 2, 3)])
@pytest.mark.parametrize("name", PENALTIES)
def test_derivatives_agree_with_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    saliency = random_saliency(shape)
    assert gradcheck(PENALTIES[name][0], (saliency,))
    assert gradgradcheck(PENALTIES[name][0], (saliency,))


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_depends_on_the_scale_of_a_sample(shape: tuple[int, ...]) -> None:
    saliency = random_saliency(shape).detach()
    scale = torch.logspace(-8, 8, shape[1], dtype=torch.float64).reshape(
        1, -1, *[1] * (len(shape) - 2)
    )
    torch.testing.assert_close(csa_loss(saliency * scale), csa_loss(saliency))
    torch.testing.assert_close(csa_by_samples(saliency * scale), csa_loss(saliency))
    torch.testing.assert_close(tsr_loss(saliency * scale), tsr_loss(saliency))


@pytest.mark.parametrize("name", PENALTIES)
def test_neither_depends_on_the_order_of_tasks_samples_or_positions(name: str) -> None:
    penalty = PENALTIES[name][0]
    saliency = random_saliency((3, 4, 6, 5)).detach()
    for axis in (0, 1, 3):
        torch.testing.assert_close(penalty(saliency.flip(axis)), penalty(saliency))


def test_tsr_lies_between_one_task_a_position_and_all_tasks_alike() -> None:
    exclusive = torch.zeros(3, 2, 4, 6)
    for position in range(6):
        exclusive[position % 3, :, :, position] = 1.0
    assert tsr_loss(exclusive).item() == 0.0
    alike = torch.ones(3, 2, 4, 6)
    assert tsr_loss(alike).item() == pytest.approx(math.log(3))
    assert 0 < tsr_loss(random_saliency((3, 2, 4, 6))).item() < math.log(3)


def test_csa_is_lowest_when_tasks_agree_and_samples_differ() -> None:
    """Equal tasks, one position, orthogonal samples: every cosine with the own anchor is 1, with
    others' 0."""
    saliency = torch.eye(4, 8).expand(2, 4, 8).contiguous()
    expected = -1 / 0.5 + math.log(3)
    assert csa_loss(saliency, temperature=0.5).item() == pytest.approx(expected)
    assert csa_loss(random_saliency((2, 4, 8)).float(), temperature=0.5).item() > expected


def test_values_are_pinned() -> None:
    saliency = torch.arange(48, dtype=torch.float64).reshape(2, 3, 4, 2).sin()
    assert tsr_loss(saliency).item() == pytest.approx(0.4568041218, abs=1e-9)
    for csa in (csa_loss, csa_by_samples):
        assert csa(saliency, temperature=0.5).item() == pytest.approx(0.5765098106, abs=1e-9)


@pytest.mark.parametrize("name", PENALTIES)
def test_saliencies_of_1e_minus_20_lose_nothing_in_float32(name: str) -> None:
    ours, literal = PENALTIES[name]
    base = random_saliency((2, 4, 16, 10), seed=3)
    tiny = (base.detach().float() * 1e-20).requires_grad_()
    value = ours(tiny)
    (gradient,) = torch.autograd.grad(value, tiny)
    expected = literal(base)
    (expected_gradient,) = torch.autograd.grad(expected, base)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double() * 1e-20, expected_gradient, rtol=1e-3, atol=1e-6)


def test_a_task_far_smaller_than_another_keeps_its_affinity() -> None:
    """Cosines do not see a task's scale: a saliency 1e-25 times another's must not underflow in
    float32."""
    saliency = random_saliency((2, 4, 16, 10), seed=4).detach().clone()
    saliency[1] *= 1e-25
    torch.testing.assert_close(
        csa_loss(saliency.float(), temperature=0.3).double(),
        literal_csa(saliency, 0.3),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PENALTIES)
def test_autocast_does_not_lower_the_precision(name: str, dtype: Any) -> None:
    saliency = random_saliency((2, 4, 16, 10), torch.float32)
    expected = PENALTIES[name][0](saliency)
    with torch.autocast("cpu", dtype=dtype):
        found = PENALTIES[name][0](saliency)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()
    assert PENALTIES[name][0](saliency.detach().bfloat16()).dtype == torch.float32


def gap_case(kind: Any) -> Any:
    saliency = random_saliency((2, 4, 6, 5), seed=7).detach().clone()
    if kind == "a sample without labels of one task":
        saliency[0, 1] = 0
    elif kind == "a sample without any labels":
        saliency[:, 2] = 0
    elif kind == "a position where all are zero":
        saliency[..., 3] = 0
    elif kind == "a task without labels":
        saliency[1] = 0
    elif kind == "nothing":
        saliency[:] = 0
    return saliency.requires_grad_()


@pytest.mark.parametrize(
    "kind",
    [
        "a sample without labels of one task",
        "a sample without any labels",
        "a position where all are zero",
        "a task without labels",
        "nothing",
    ],
)
@pytest.mark.parametrize("name", PENALTIES)
def test_gaps_give_no_nan_to_second_order(name: str, kind: str) -> None:
    saliency = gap_case(kind)
    for tensor in value_and_derivatives(PENALTIES[name][0], saliency):
        assert torch.isfinite(tensor).all()


def test_csa_leaves_out_pairs_without_saliency() -> None:
    saliency = gap_case("a sample without labels of one task")
    losses = []
    anchors = saliency.mean(dim=3).permute(1, 2, 0)
    z_anchor = torch.nn.functional.normalize((anchors @ anchors.transpose(1, 2)).flatten(1), dim=1)
    z_task = torch.nn.functional.normalize((saliency @ saliency.transpose(2, 3)).flatten(2), dim=2)
    for b in range(4):
        negatives = torch.stack([z_anchor[b] @ z_anchor[k] / 0.5 for k in range(4) if k != b])
        for t in range(2):
            if (t, b) != (0, 1):
                losses.append(torch.logsumexp(negatives, 0) - z_anchor[b] @ z_task[t, b] / 0.5)
    for csa in (csa_loss, csa_by_samples):
        torch.testing.assert_close(csa(saliency, temperature=0.5), torch.stack(losses).mean())


def test_csa_takes_a_sample_without_labels_out_of_the_negatives() -> None:
    saliency = gap_case("a sample without any labels")
    present = saliency[:, [0, 1, 3]]
    torch.testing.assert_close(csa_loss(saliency), csa_loss(present))


def test_tsr_leaves_out_positions_without_saliency() -> None:
    saliency = gap_case("a position where all are zero")
    torch.testing.assert_close(tsr_loss(saliency), tsr_loss(saliency[..., [0, 1, 2, 4]]))
    assert tsr_loss(gap_case("nothing")).item() == 0.0


def test_csa_never_builds_the_larger_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest intermediate of 512 channels at 2 positions stays far below one 512 x 512 matrix
    a sample."""
    sizes = []
    original = torch.Tensor.__matmul__

    def spy(left: Any, right: Any) -> Any:
        result = original(left, right)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    csa_loss(random_saliency((2, 3, 512, 2)))
    csa_loss(random_saliency((2, 3, 2, 512)))
    assert sizes
    assert max(sizes) < 512 * 512 / 10


class LargeTensors(TorchDispatchMode):
    """Counts operations whose result has so many numbers, and is no view of another."""

    def __init__(self, num_numbers: int) -> None:
        super().__init__()
        self.num_numbers = num_numbers
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.names += [str(func) for t in tensors if t.numel() >= self.num_numbers]
        return result


@pytest.mark.parametrize("shape", [(2, 9, 16, 8), (2, 9, 8, 16)])
def test_of_a_large_saliency_csa_makes_nothing_as_large_but_its_gradient(
    shape: tuple[int, ...],
) -> None:
    saliency = random_saliency(shape, torch.float32)
    with LargeTensors(saliency.numel() // 2) as large:
        csa_by_samples(saliency).backward()
    assert large.names == ["aten.empty_like.default"]
    expected = random_saliency(shape)
    csa_loss(expected).backward()
    torch.testing.assert_close(saliency.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_tokens_are_contrasted_by_samples_too() -> None:
    tokens = random_saliency((2, 3, 7, 4))
    first = [
        torch.autograd.grad(csa(tokens.movedim(-1, 2)), tokens)[0]
        for csa in (csa_loss, csa_by_samples)
    ]
    torch.testing.assert_close(*first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tsr_loss([torch.ones(2, 1, 4)]), "saliency is a list; expected the tensor"),
        (lambda: csa_loss(torch.ones(2, 1, 4)), "global batch of 1 sample"),
        (lambda: csa_loss(torch.ones(2, 4)), r"shape \(2, 4\); expected \[tasks, batch, channels"),
        (lambda: tsr_loss(torch.ones(1, 2, 4)), "has 1 task"),
        (lambda: csa_loss(torch.ones(1, 2, 4)), "has 1 task"),
        (
            lambda: csa_loss(torch.ones(2, 2, 4), temperature=0.0),
            "temperature is 0.0; expected a finite number above 0",
        ),
    ],
)
def test_bad_input_is_explained(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_rep_mtl_in_a_plain_training_loop() -> None:
    torch.manual_seed(0)
    encoder, heads = torch.nn.Linear(6, 5), [torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)]
    representation = torch.tanh(encoder(torch.randn(4, 6)))
    losses = [torch.nn.functional.softplus(head(representation)).mean().log() for head in heads]
    penalty = RepMTL(0.9, 0.7, 0.5)(losses, representation)
    from repmtl_ray.saliency import task_saliency

    saliency = task_saliency(losses, representation)
    torch.testing.assert_close(
        penalty, 0.9 * tsr_loss(saliency) + 0.7 * csa_loss(saliency, temperature=0.5)
    )
    (sum(losses) + penalty).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_weight_of_zero_takes_a_penalty_out_with_its_demands() -> None:
    representation = torch.randn(1, 5, requires_grad=True)
    losses = [(representation**2).sum(), representation.exp().sum()]
    assert RepMTL(0.9, 0.0)(losses, representation).item() > 0
    assert RepMTL(0.0, 0.0)(losses, representation).item() == 0
    with pytest.raises(ValueError, match="global batch of 1 sample"):
        RepMTL(0.0, 0.9)(losses, representation)


def test_the_divergence_loss_lies_between_separate_and_equal_saliencies() -> None:
    """Whatever a task's size is: dominance lowers TSR, and leaves this one where it was."""
    separate = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    separate[0, :, :, :2], separate[1, :, :, 2:] = 1.0, -2.0
    assert float(divergence_loss(separate)) == pytest.approx(0, abs=1e-12)
    equal = random_saliency((1, 2, 3, 4)).detach().expand(3, 2, 3, 4)
    assert float(divergence_loss(equal)) == pytest.approx(math.log(3))
    dominated = equal * torch.tensor([1.0, 1e-6, 1e-6])[:, None, None, None]
    assert float(tsr_loss(dominated)) < 1e-3
    assert float(divergence_loss(dominated)) == pytest.approx(math.log(3))
    centred = random_saliency((2, 3, 4, 5)).detach()
    centred[0] -= centred[0].mean(dim=1, keepdim=True)  # a head whose weights sum to zero
    assert float(tsr_loss(centred)) < 1e-9 < 0.1 < float(divergence_loss(centred))


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (3, 2, 3), (2, 2, 2, 3)])
def test_the_divergence_loss_is_log_t_minus_the_mutual_information(shape: tuple[int, ...]) -> None:
    saliency = random_saliency(shape)
    energy = saliency.detach().square().sum(dim=2).flatten(1)
    joint = energy / energy.sum(dim=1, keepdim=True) / shape[0]  # of task and position
    independent = joint.sum(dim=0) * joint.sum(dim=1, keepdim=True)
    information = (joint * (joint / independent).log()).sum()
    torch.testing.assert_close(divergence_loss(saliency), math.log(shape[0]) - information)
    assert gradcheck(divergence_loss, (saliency,))
    assert gradgradcheck(divergence_loss, (saliency,))


def test_the_divergence_loss_has_no_nan_for_gaps_and_leaves_absent_tasks_out() -> None:
    saliency = random_saliency((3, 4, 5, 2)).detach()
    saliency[2] = 0
    saliency[0, 1] = 0
    saliency.requires_grad_()
    for found in value_and_derivatives(divergence_loss, saliency):
        assert torch.isfinite(found).all()
    torch.testing.assert_close(divergence_loss(saliency), divergence_loss(saliency[:2]))
