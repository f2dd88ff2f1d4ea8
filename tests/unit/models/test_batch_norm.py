"""Two real workers normalise as one process with all rows does, to the second derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.models.batch_norm import GlobalBatchNorm, frozen_statistics, use_global_statistics
from tests.helpers.gloo import Pool

LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
ROWS = {"equal": (4, 4), "unequal": (3, 5), "one row": (7, 1), "none": (8, 0)}


class Small(nn.Module):
    """Every kind of layer that is replaced, around a representation that saliency is taken at."""

    def __init__(self, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, momentum=momentum), nn.Tanh()
        )
        self.head = nn.Sequential(
            nn.Conv2d(3, 4, 1),
            BatchNormAct2d(4, act_layer=nn.Softplus, affine=affine),  # smooth: kinks would hide
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.BatchNorm1d(4, momentum=momentum),
            nn.Linear(4, 1),
            nn.Tanh(),
        )


def _model(**arguments: float | bool | None) -> Small:
    torch.manual_seed(3)
    model = Small(**arguments).double()  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 2, 5, 6, generator=generator, dtype=torch.float64)


def _one_pass(model: Small, images: Tensor, workers: Workers) -> dict[str, Tensor]:
    """A training pass with a saliency penalty; parameter gradients totalled, rows own."""
    images = images.clone().requires_grad_()
    features = model.encoder(images)
    output = model.head(features)
    loss = workers.total((output**2 + output).sum()) / 8
    (saliency,) = torch.autograd.grad(loss, features, create_graph=True)
    penalty = workers.total((saliency**2 * 1e3).sum()).log()
    parameters = dict(model.named_parameters())
    first = torch.autograd.grad(loss, [images, *parameters.values()], retain_graph=True)
    second = torch.autograd.grad(penalty, [images, *parameters.values()], allow_unused=True)
    found = {"output": output, "saliency": saliency, "loss": loss, "penalty": penalty}
    found |= {"images, first": first[0], "images, second": second[0]}
    for order, gradients in (("first", first), ("second", second)):
        for (name, parameter), gradient in zip(parameters.items(), gradients[1:], strict=True):
            total = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            workers.total_([total])
            found[f"{name}, {order}"] = total
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: tensor.detach() for name, tensor in found.items()}


def _far_images() -> Tensor:
    return (_images()[:, :1].float() + 1e4).expand(-1, 3, -1, -1)


def _gradient(layer: nn.Module, images: Tensor, *, second_too: bool) -> Tensor:
    """The derivative of a curved sum with respect to the images."""
    images = images.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(images).sin().sum(), images, create_graph=second_too)
    return found.detach()


def _results_of(workers: Workers) -> dict[tuple[str, float | None], dict[str, torch.Tensor]]:
    rank = workers.rank
    results = {}
    for name, rows in ROWS.items():
        for momentum, affine in ((0.1, True), (None, False)):
            model = use_global_statistics(_model(momentum=momentum, affine=affine), workers)
            own = _images().split(list(rows))[rank]
            results[name, momentum] = _one_pass(model, own, workers)
    layer = use_global_statistics(nn.BatchNorm2d(3), workers)
    far = _far_images().split([3, 5])[rank]
    results["far", None] = {"output": layer(far).detach()}
    with frozen_statistics(layer):
        layer(far * 2)
    results["far", None] |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    results["gradients", None] = {
        f"{layout}, {second_too}": _gradient(
            layer, far.contiguous(memory_format=memory_format), second_too=second_too
        )
        for layout, memory_format in LAYOUTS.items()
        for second_too in (False, True)
    }
    low = _images()[:, :1].expand(-1, 3, -1, -1).bfloat16().split([3, 5])[rank]
    layer = use_global_statistics(nn.BatchNorm2d(3), workers)
    with torch.autocast("cpu", torch.bfloat16):
        results["low", None] = {"output": layer(low).detach()}
    return results


@pytest.fixture(scope="module")
def two_workers(pool_of: Callable[[int], Pool]) -> list[Any]:
    return pool_of(2).run(_results_of)


@pytest.mark.parametrize(("momentum", "affine"), [(0.1, True), (None, False)])
@pytest.mark.parametrize("rows", list(ROWS))
def test_two_workers_equal_one_process_with_all_rows(
    two_workers: list[Any], rows: Any, momentum: float | None, affine: bool
) -> None:
    expected = _one_pass(_model(momentum=momentum, affine=affine), _images(), ALONE)
    parts = [results[rows, momentum] for results in two_workers]
    assert expected.keys() == parts[0].keys()
    for name, whole in expected.items():
        by_rows = name in ("output", "saliency", "images, first", "images, second")
        found = torch.cat([part[name] for part in parts]) if by_rows else parts[0][name]
        torch.testing.assert_close(
            found, whole, rtol=1e-10, atol=1e-10, msg=partial(str.__add__, name)
        )


def test_running_statistics_are_the_same_on_both_workers_to_the_bit(two_workers: list[Any]) -> None:
    first, second = (results["unequal", 0.1] for results in two_workers)
    names = [name for name in first if "running" in name or "num_batches" in name]
    assert len(names) == 9
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_a_mean_far_from_zero_costs_few_digits_in_float32(two_workers: list[Any]) -> None:
    values = _far_images()
    exact = nn.BatchNorm2d(3).double()
    output = torch.cat([results["far", None]["output"] for results in two_workers])
    torch.testing.assert_close(output.double(), exact(values.double()), rtol=0, atol=2e-3)
    found = two_workers[0]["far", None]["running_var"].double()
    torch.testing.assert_close(found, exact.running_var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_gradient_is_the_same_with_and_without_a_second_derivative(
    two_workers: list[Any], layout: str
) -> None:
    exact = _gradient(nn.BatchNorm2d(3).double(), _far_images().double(), second_too=False)
    for second_too in (False, True):
        parts = [results["gradients", None][f"{layout}, {second_too}"] for results in two_workers]
        torch.testing.assert_close(torch.cat(parts).double(), exact, rtol=0, atol=2e-3)
    for results in two_workers:
        alone, with_second = (results["gradients", None][f"{layout}, {x}"] for x in (False, True))
        torch.testing.assert_close(alone, with_second, rtol=1e-5, atol=1e-6)


def test_low_precision_stays_low_outside_and_high_inside(two_workers: list[Any]) -> None:
    output = torch.cat([results["low", None]["output"] for results in two_workers])
    images = _images()[:, :1].expand(-1, 3, -1, -1).bfloat16()
    assert output.dtype == torch.bfloat16
    exact = nn.BatchNorm2d(3).double()(images.double())
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_second_look_of_two_workers_leaves_no_trace(two_workers: list[Any]) -> None:
    assert all(results["far", None]["num_batches_tracked"] == 1 for results in two_workers)


LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "1d positions": (lambda: nn.BatchNorm1d(3, momentum=None), (4, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
    "2d untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 2)),
    "activation": (lambda: BatchNormAct2d(3, act_layer=nn.SiLU), (4, 3, 5, 2)),
    "learnt activation": (lambda: BatchNormAct2d(3, act_layer=nn.PReLU), (4, 3, 5, 2)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_worker_is_the_layer_it_replaces_to_the_bit(kind: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make()
    if kind == "learnt activation":  # PReLU wants one dtype
        plain.act.to(dtype)
    replaced = use_global_statistics(copy.deepcopy(plain))
    assert isinstance(replaced, GlobalBatchNorm)
    for _ in range(2):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(plain(x.clone()), replaced(x.clone()))
    assert plain.state_dict().keys() == replaced.state_dict().keys()
    assert all(torch.equal(a, replaced.state_dict()[n]) for n, a in plain.state_dict().items())
    plain.eval(), replaced.eval()
    assert torch.equal(plain(x.clone()), replaced(x.clone()))


def test_replacing_keeps_parameters_names_and_modes() -> None:
    model = _model()
    model.encoder.eval()
    parameters, names = list(model.parameters()), list(model.state_dict())
    shared = model.encoder[1]
    model.again = shared  # the same layer under two names
    assert use_global_statistics(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [name for name in model.state_dict() if not name.startswith("again")] == names
    assert model.again is model.encoder[1]
    assert not model.encoder[1].training
    assert model.head[1].training
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 3
    assert all(type(norm) is GlobalBatchNorm for norm in norms)


def test_a_single_value_is_normalised_by_the_running_statistics() -> None:
    layer = use_global_statistics(nn.BatchNorm2d(3))
    layer(torch.randn(4, 3, 2, 2))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(1, 3, 1, 1)
    found = layer(x)
    assert torch.equal(found, layer.eval()(x))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_frozen_statistics_change_no_output_and_no_buffer(replaced: bool, training: bool) -> None:
    model = _model()
    model = (use_global_statistics(model) if replaced else model).train(training)
    twin = copy.deepcopy(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with frozen_statistics(model):
        found = model.head(model.encoder(_images()))
    assert torch.equal(found, twin.head(twin.encoder(_images())))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.head(model.encoder(_images()))
    changed = not torch.equal(model.encoder[1].running_mean, before["encoder.1.running_mean"])
    assert changed == training


def test_an_unknown_kind_of_batch_norm_is_refused_with_several_workers() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.Identity(), Odd(3))
    with pytest.raises(ValueError, match="1 is a Odd, whose statistics cannot be made global"):
        use_global_statistics(model, Workers(rank=0, size=2))
    assert type(use_global_statistics(model)[1]) is Odd
