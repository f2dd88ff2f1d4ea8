"""`RepMTL` in other people's training loops: what it accepts, what it refuses, and data parallelism."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from repmtl_ray.collectives import ALONE, Workers, current
from repmtl_ray.config import NonFiniteLossError
from repmtl_ray.models.batch_norm import use_global_statistics
from repmtl_ray.penalties import csa_loss, tsr_loss
from repmtl_ray.regularizers import RepMTL
from tests.helpers.gloo import Pool
from tests.helpers.literal import literal_csa, literal_tsr


def losses_at(representation: Tensor) -> list[Tensor]:
    """Two scalar losses whose saliency depends on the representation."""
    return [representation.square().mean(), (representation - 1).exp().mean()]


def representation_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def literal_penalty(saliency: Tensor) -> Tensor:
    return 0.9 * literal_tsr(saliency) + 0.9 * literal_csa(saliency, 0.5)


def test_it_is_a_module_without_parameters_that_shows_its_settings() -> None:
    regularizer = RepMTL(0.5, 0, channel_axis=-1)
    assert isinstance(regularizer, nn.Module)
    assert not regularizer.state_dict()
    assert (
        repr(regularizer)
        == "RepMTL(lambda_tsr=0.5, lambda_csa=0.0, temperature=0.5, channel_axis=-1)"
    )
    assert not list(nn.ModuleDict({"penalty": regularizer}).parameters())
    for copied in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert repr(copied) == repr(regularizer)


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, "0.9", None, True, [0.9], 1j])
@pytest.mark.parametrize("name", ["lambda_tsr", "lambda_csa", "temperature"])
def test_a_setting_outside_its_range_is_refused_when_made_and_when_changed(
    name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*expected a finite number"):
        RepMTL(**{name: value})
    regularizer = RepMTL()
    with pytest.raises(ValueError, match=f"{name} is .*expected a finite number"):
        setattr(regularizer, name, value)
    assert getattr(regularizer, name) == getattr(RepMTL(), name)


def test_a_temperature_of_zero_is_refused_when_made() -> None:
    with pytest.raises(ValueError, match="temperature is 0; expected a finite number above 0"):
        RepMTL(temperature=0)


@pytest.mark.parametrize("workers", [2, None, "current", (0, 1)])
def test_workers_that_are_none_are_refused_when_made(workers: Any) -> None:
    with pytest.raises(ValueError, match=r"workers is .*collectives.current\(\)"):
        RepMTL(workers=workers)


@pytest.mark.parametrize("axis", [0, 5, -5, 1.0, "1", True, 99, (1,)])
def test_a_channel_axis_that_no_representation_has_is_refused_when_made(axis: Any) -> None:
    with pytest.raises(ValueError, match=r"channel_axis is .*0, which is the batch"):
        RepMTL(channel_axis=axis)


def test_three_axes_without_a_channel_axis_are_refused_with_both_readings() -> None:
    representation = representation_of(4, 6, 5)
    with pytest.raises(ValueError, match=r"\(4, 6, 5\).*channel_axis=1.*channel_axis=-1"):
        RepMTL()(losses_at(representation), representation)
    for axis in (1, 2, -1, -2):
        saliency = torch.stack(
            torch.autograd.grad(sum(losses_at(representation)), [representation]) * 2
        )
        assert RepMTL(channel_axis=axis)(losses_at(representation), representation) >= 0
        assert saliency.shape == (2, 4, 6, 5)


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 6), 2), ((4, 6), -2), ((4, 6, 5), 3), ((4, 6, 5), -3), ((4,), None)]
)
def test_a_channel_axis_that_this_representation_lacks_is_refused(
    shape: tuple[int, ...], axis: int | None
) -> None:
    representation = representation_of(*shape)
    with pytest.raises(ValueError, match=r"representation has shape \(4,"):
        RepMTL(channel_axis=axis)(losses_at(representation), representation)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4, 6), None),
        ((4, 6), -1),
        ((4, 6, 5), 1),
        ((4, 5, 6), -1),
        ((4, 6, 3, 2), None),
        ((4, 3, 2, 6), -1),
        ((4, 6, 3, 2, 2), None),
    ],
)
def test_the_penalty_is_that_of_the_printed_equations_for_every_layout(
    shape: tuple[int, ...], axis: int | None
) -> None:
    representation = representation_of(*shape)
    penalty = RepMTL(channel_axis=axis)(losses_at(representation), representation)
    saliency = torch.stack(
        [
            torch.autograd.grad(loss, representation, create_graph=True)[0]
            for loss in losses_at(representation)
        ]
    )
    channels_first = saliency.movedim(-1, 2) if axis == -1 else saliency
    torch.testing.assert_close(penalty, literal_penalty(channels_first))


def test_losses_may_be_a_mapping_an_iterator_or_a_tuple() -> None:
    representation = representation_of(4, 6)
    expected = RepMTL()(losses_at(representation), representation)
    first, second = losses_at(representation)
    for losses in ({"a": first, "b": second}, (first, second), iter([first, second])):
        torch.testing.assert_close(RepMTL()(losses, representation), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (None, "losses is None; expected a list of scalar losses, or a mapping"),
        ("ab", "losses is 'ab'; expected a list"),
        ([], "losses is empty"),
        ({}, "losses is empty"),
        ([1.0, 2.0], r"losses\[0\] is float; expected a scalar tensor"),
        ({"depth": None}, r"losses\['depth'\] is NoneType"),
        ({"depth": torch.ones(3)}, r"losses\['depth'\] has shape \(3,\)"),
        (torch.ones(2), "losses is one tensor of shape"),
        ({"depth": torch.ones(())}, r"losses\['depth'\] does not depend on the representation"),
    ],
)
def test_losses_that_are_none_are_explained(losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepMTL()(losses, representation_of(4, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weights", [(0.9, 0.9), (0.9, 0.0), (0.0, 0.9)])
def test_a_loss_that_is_not_finite_is_named(weights: tuple[float, float], value: float) -> None:
    representation = representation_of(4, 6)
    losses = dict(zip(("depth", "normal"), losses_at(representation), strict=True))
    losses["normal"] = losses["normal"] * value
    with pytest.raises(NonFiniteLossError, match=r"losses\['normal'\] is -?(nan|inf)"):
        RepMTL(*weights)(losses, representation)


@pytest.mark.parametrize("penalty", [tsr_loss, csa_loss])
def test_a_saliency_that_is_not_a_number_shows_in_the_penalty(
    penalty: Callable[[Tensor], Tensor],
) -> None:
    saliency = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    saliency[0, 1, 2, 3] = math.nan
    assert penalty(saliency).isnan()


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (3, 8))
        return self.attention(tokens, tokens, tokens, need_weights=self.need_weights)[0]


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (1, 3, 8))
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.hardsigmoid(x)


def linear(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 24, dtype=torch.float64), *more)


def compiled(*_: Any) -> nn.Module:
    return torch.compile(linear(nn.Tanh()), backend="aot_eager")  # type: ignore[return-value]


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fused attention": (Fused, r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"),
    "multi-head attention": (lambda: Attention(need_weights=False), "SDPBackend.MATH"),
    "compiled head": (compiled, r"encoder = torch.compile\(encoder\)"),
    "activation in place": (
        lambda: linear(nn.Sigmoid(), nn.ReLU(inplace=True)),
        "for m in model.modules.*m.inplace = False",
    ),
    "representation changed in place": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), linear()),
        "for m in model.modules.*m.inplace = False",
    ),
    "no second derivative": (Sigmoid, "hardsigmoid_backward.*|differentiated twice"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_without_a_second_derivative_is_named_at_the_first_call(kind: str) -> None:
    make, message = HEADS[kind]
    torch.manual_seed(0)
    encoder, heads = linear(nn.Tanh()), [make(), make()]
    representation = encoder(torch.randn(4, 24, dtype=torch.float64))
    losses = [head(representation).square().mean() for head in heads]
    with pytest.raises(ValueError, match=message):
        RepMTL()(losses, representation)


def test_the_remedies_of_the_messages_work() -> None:
    representation = representation_of(4, 24)
    torch.manual_seed(0)
    for make in (Fused, lambda: Attention(need_weights=False), lambda: Attention(True)):
        heads = [make(), make()]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = [head(representation).square().mean() * 2 for head in heads]
        assert RepMTL()(losses, representation).requires_grad
    model = nn.ModuleList([linear(nn.Sigmoid(), nn.ReLU(inplace=True)) for _ in range(2)])
    for m in model.modules():
        m.inplace = False  # type: ignore[assignment]
    losses = [head(representation).square().mean() for head in model]
    assert RepMTL()(losses, representation).requires_grad


def test_a_frozen_encoder_is_explained_and_its_remedy_works() -> None:
    encoder, heads = linear(nn.Tanh()), [linear(), linear()]
    encoder.requires_grad_(False)
    representation = encoder(torch.randn(4, 24, dtype=torch.float64))
    losses = [head(representation).square().mean() for head in heads]
    with pytest.raises(ValueError, match=r"frozen.*`representation.requires_grad_\(\)`"):
        RepMTL()(losses, representation)
    representation = encoder(torch.randn(4, 24, dtype=torch.float64)).requires_grad_()
    losses = [head(representation).square().mean() for head in heads]
    RepMTL()(losses, representation).backward()
    assert heads[0][0].weight.grad is not None


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_turned_off_are_explained(off: Callable[[], Any]) -> None:
    with off():
        representation = linear()(torch.randn(4, 24, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"gradients are turned off.*enable_grad"):
            RepMTL()(losses_at(representation), representation)
        assert RepMTL(0, 0)(losses_at(representation), representation) == 0


@pytest.mark.parametrize("several", [tuple, list])
def test_a_feature_pyramid_is_explained(several: Callable[[Any], Any]) -> None:
    representation = representation_of(4, 6)
    with pytest.raises(ValueError, match=r"of 2; expected one tensor.*representation\[-1\]"):
        RepMTL()(losses_at(representation), several([representation, representation]))


def test_a_graph_that_is_freed_is_explained() -> None:
    head = linear(nn.Tanh())
    representation = representation_of(4, 24)
    losses = [head(representation).square().mean(), head(representation).exp().mean()]
    sum(losses).backward()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="before the backward pass"):
        RepMTL()(losses, representation)


class Net(nn.Module):
    """The guide's network: an encoder with batch norm and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3)
        )
        self.heads = nn.ModuleList([nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)])

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        representation = self.encoder(images)
        return representation, [head(representation) for head in self.heads]


def parallel_gradients(
    workers: Workers, with_ddp: bool, log_losses: bool, bound: Mapping[str, Any]
) -> list[Tensor]:
    """One step's gradients by the guide's recipe, as this worker has them."""
    torch.manual_seed(0)
    net = use_global_statistics(Net().double(), workers)
    images = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    targets = torch.rand(2, 8, 1, 4, 4, dtype=torch.float64)
    own = slice(workers.rank * 8 // workers.size, (workers.rank + 1) * 8 // workers.size)
    regularizer = RepMTL(workers=workers, **bound)
    model = DistributedDataParallel(net) if with_ddp else net
    for _ in range(2):  # the second step has no checks of a first call
        net.zero_grad(set_to_none=True)
        representation, predictions = model(images[own])
        losses = []
        for prediction, target in zip(predictions, targets[:, own], strict=True):
            loss_sum = nn.functional.mse_loss(prediction, target, reduction="sum")
            count = torch.tensor(target.numel(), dtype=torch.float64)
            loss = workers.total(loss_sum) / workers.total(count)
            losses.append(loss.log() if log_losses else loss)
        objective = sum(losses) + regularizer(losses, representation)
        if with_ddp:
            (workers.size * objective).backward()  # DDP takes the mean over workers
        else:
            objective.backward()
            workers.total_([p.grad for p in net.parameters() if p.grad is not None])
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("log_losses", [True, False])
@pytest.mark.parametrize("with_ddp", [True, False])
@pytest.mark.parametrize(
    "bound", [{}, {"share": 0.2}, {"share": 0.2, "through": "encoder"}], ids=str
)
def test_two_processes_have_the_gradients_of_one(
    bound: dict[str, Any], with_ddp: bool, log_losses: bool, pool_of: Callable[[int], Pool]
) -> None:
    expected = parallel_gradients(ALONE, False, log_losses, bound)
    for gradients in pool_of(2).run(parallel_gradients, with_ddp, log_losses, bound):
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)


def message_with_own_losses(workers: Workers, value: float) -> str:
    """What `RepMTL` says to losses of each worker's own rows; rank 1's is multiplied by `value`."""
    assert current() == workers
    representation = representation_of(4, 6)
    losses = [loss * (value if workers.rank else 1.0) for loss in losses_at(representation)]
    try:
        RepMTL(workers=workers)(losses, representation)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("value", "message"),
    [(2.0, "losses[0] differs between workers"), (math.nan, "losses[0] is nan"), (1.0, "accepted")],
)
def test_losses_that_are_not_global_are_refused_on_every_worker(
    value: float, message: str, pool_of: Callable[[int], Pool]
) -> None:
    answers = pool_of(2).run(message_with_own_losses, value)
    assert answers[0] == answers[1]
    assert answers[0].startswith(message)


def bounded_parts(
    share: float | None, through: Any, weights: Any = None
) -> tuple[list[Any], list[Any]]:
    """Gradients of encoder and heads after `(sum(losses) + regularizer(...)).backward()`."""
    torch.manual_seed(0)
    net = Net().double()
    images = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    targets = torch.rand(2, 8, 1, 4, 4, dtype=torch.float64)
    representation, predictions = net(images)
    losses = [
        (prediction - target).square().mean().log()
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    regularizer = RepMTL(share=share, through=through)
    factors = [1.0, 1.0] if weights is None else weights
    objective = sum(w * loss for w, loss in zip(factors, losses, strict=True))
    (objective + regularizer(losses, representation, weights)).backward()
    return [p.grad for p in net.encoder.parameters()], [p.grad for p in net.heads.parameters()]


def gradients_of_net(weights: Any) -> dict[str, Any]:
    """g and G at the representation, and both by parameter, by plain autograd."""
    torch.manual_seed(0)
    net = Net().double()
    images = torch.rand(8, 3, 6, 6, dtype=torch.float64)
    targets = torch.rand(2, 8, 1, 4, 4, dtype=torch.float64)
    representation, predictions = net(images)
    losses = [
        (prediction - target).square().mean().log()
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    saliency = torch.stack(
        [torch.autograd.grad(loss, representation, create_graph=True)[0] for loss in losses]
    )
    values = {
        "tasks": sum(w * loss for w, loss in zip(weights, losses, strict=True)),
        "penalty": literal_penalty(saliency),
    }
    inputs = [representation, *net.encoder.parameters(), *net.heads.parameters()]
    return {
        name: torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        for name, value in values.items()
    }


@pytest.mark.parametrize("weights", [None, [0.3, 1.7]])
@pytest.mark.parametrize("through", ["all", "encoder"])
def test_a_share_in_a_loop_of_ones_own_is_what_two_plain_gradients_make(
    through: str, weights: list[float] | None
) -> None:
    encoder, heads = bounded_parts(0.2, through, weights)
    expected = gradients_of_net(weights or [1.0, 1.0])
    tasks, penalty = expected["tasks"], expected["penalty"]
    scale = 0.2 * tasks[0].norm() / penalty[0].norm()
    for index, found in enumerate([*encoder, *heads], start=1):
        reached = index <= len(encoder) or through == "all"
        of_penalty = penalty[index] if penalty[index] is not None else torch.zeros_like(found)
        total = tasks[index] + (scale * of_penalty if reached else 0.0)
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


def test_through_the_encoder_alone_has_the_printed_size() -> None:
    encoder, heads = bounded_parts(None, "encoder")
    printed, _ = bounded_parts(None, "all")
    expected = gradients_of_net([1.0, 1.0])["tasks"]
    torch.testing.assert_close(encoder, printed)
    torch.testing.assert_close(heads, list(expected[1 + len(encoder) :]))


def test_weights_of_another_number_than_the_losses_are_refused() -> None:
    representation = representation_of(4, 6)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\); .*each of the 2 losses"):
        RepMTL(share=0.1)(losses_at(representation), representation, [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is 0.0; expected a finite number above 0"),
        ({"share": 1.5}, "share is 1.5; expected a number above 0 and at most 1"),
        ({"share": "0.1"}, "share is '0.1'"),
        ({"through": "heads"}, "through is 'heads'; expected 'all' or 'encoder'"),
        ({"lambda_tsr": 0, "lambda_csa": 0, "share": 0.1}, "there is no penalty to bound"),
    ],
)
def test_a_bound_that_means_nothing_is_refused_when_made(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RepMTL(**settings)


def test_penalties_that_are_turned_off_later_leave_a_share_nothing_to_bound() -> None:
    regularizer = RepMTL(share=0.1)
    regularizer.lambda_tsr = regularizer.lambda_csa = 0.0
    representation = representation_of(4, 6)
    with pytest.raises(ValueError, match="there is no penalty to bound"):
        regularizer(losses_at(representation), representation)
