"""The place where saliency is taken: its channel axis and second derivatives are found, not guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repmtl_ray.config import ModelConfig
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.models.representation import (
    channel_axis,
    check_second_derivative,
    representation_module,
)
from repmtl_ray.tasks import Classification, InverseDepth, Segmentation, Task

SIZE = (64, 96)
DENSE: tuple[Task, ...] = (
    Segmentation(name="segmentation", num_classes=4),
    InverseDepth(name="depth"),
)
LABELS: tuple[Task, ...] = (
    Classification(name="amazon", num_classes=3),
    Classification(name="dslr", num_classes=3),
)
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"


def build(
    encoder: str, representation: str, features: str = "map", **options: Any
) -> MultiTaskModel:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=encoder,
        features=features,  # type: ignore[arg-type]
        head="linear",
        output_stride=None,
        representation=representation,
    )
    return build_model(config, DENSE if features == "map" else LABELS, image_size=SIZE, **options)


@pytest.mark.parametrize(
    ("encoder", "representation", "features", "shape", "axis"),
    [
        (SWIN, "encoder.patch_embed.proj", "map", (96, 16, 24), 1),
        (SWIN, "encoder.patch_embed", "map", (16, 24, 96), 3),
        (SWIN, "encoder.layers_1", "map", (8, 12, 192), 3),
        (SWIN, "encoder", "map", (768, 2, 3), 1),
        (VIT, "encoder.model.patch_embed.proj", "map", (192, 4, 6), 1),
        (VIT, "encoder.blocks.3", "tokens", (25, 192), 2),
        (VIT, "encoder.blocks.11", "pooled", (25, 192), 2),
        ("mixer_s32_224", "encoder.blocks.1", "tokens", (6, 512), 2),
        ("mixer_s32_224", "encoder.blocks.1.mlp_tokens", "tokens", (512, 6), 1),
        ("convnext_atto", "encoder.stages_1.blocks.0.conv_dw", "map", (80, 8, 12), 1),
        ("convnext_tiny", "encoder.stages_1.blocks.0.mlp", "map", (8, 12, 192), 3),
        ("convnext_atto", "encoder.stages_1", "map", (80, 8, 12), 1),
        ("test_efficientnet", "encoder.blocks.1", "map", (24, 16, 24), 1),
        ("resnet18", "encoder.layer4", "pooled", (512, 2, 3), 1),
        ("resnet18", "encoder.global_pool", "pooled", (512,), 1),
    ],
)
def test_the_channel_axis_is_that_of_the_module(
    encoder: str, representation: str, features: str, shape: tuple[int, ...], axis: int
) -> None:
    model = build(encoder, representation, features, penalized=False)
    assert model.representation_shape == shape
    assert model.channel_axis == axis


@pytest.mark.parametrize(
    ("encoder", "representation", "message"),
    [
        (SWIN, "encoder.layers_0.blocks.0.attn", r"rows for 2 images.*windows or heads"),
        ("maxvit_pico_rw_256", "encoder.stages_0.blocks.0.attn_block.attn", "windows or heads"),
    ],
)
def test_a_module_whose_first_axis_is_not_the_batch_is_refused(
    encoder: str, representation: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(encoder, representation)


@pytest.mark.parametrize(
    ("shape", "other"),
    [((7, 7, 7), (7, 7, 7)), ((8, 4), (8, 4)), ((6, 4), (12, 8)), ((1, 1), (1, 1)), ((8, 4), (8,))],
)
def test_an_axis_that_cannot_be_told_is_refused(
    shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"'encoder.x'.*channel axis cannot be told"):
        channel_axis("encoder.x", shape, lambda: other)


def test_a_pooled_map_has_its_channels_on_the_only_axis_longer_than_one() -> None:
    assert channel_axis("encoder.x", (8, 1, 1), lambda: (8, 1, 1)) == 1


def test_finding_the_axis_changes_neither_weights_nor_random_numbers() -> None:
    plain = build(VIT, "encoder")
    expected = torch.rand(1)
    inner = build(VIT, "encoder.model.blocks.3")
    assert torch.rand(1) == expected
    for left, right in zip(plain.parameters(), inner.parameters(), strict=True):
        assert torch.equal(left, right)
    assert inner.training


class Gate(nn.Module):
    """Channels times a function of their mean."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(x.mean(dim=(2, 3), keepdim=True))


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, None].contiguous()
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed[:, 0].transpose(1, 2).reshape(x.shape)


def model_with(module: nn.Module) -> MultiTaskModel:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), module, nn.Conv2d(8, 8, 1))
    return MultiTaskModel(encoder, {task.name: nn.Conv2d(8, 4, 1) for task in DENSE}, DENSE)


@pytest.mark.parametrize(
    ("module", "operation"),
    [
        (Gate(nn.Hardsigmoid()), "hardsigmoid_backward"),
        (nn.Hardsigmoid(), "hardsigmoid_backward"),
        (Attention(), "scaled_dot_product"),
    ],
)
def test_an_operation_without_second_derivative_is_named(module: nn.Module, operation: str) -> None:
    model = model_with(module)
    with pytest.raises(ValueError, match=rf"'encoder.0'.*{operation}.*lambda_csa to 0"):
        check_second_derivative(model, "encoder.0", torch.zeros(2, 3, *SIZE))
    check_second_derivative(model, "encoder.2", torch.zeros(2, 3, *SIZE))  # after it
    assert model.training
    assert not model.get_submodule("encoder.0")._forward_hooks


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU6,
        nn.Hardswish,
        nn.Hardtanh,
        nn.SiLU,
        nn.GELU,
        nn.Mish,
        nn.ELU,
        nn.LeakyReLU,
        nn.PReLU,
    ],
)
def test_activations_with_second_derivatives_pass(function: type[nn.Module]) -> None:
    check_second_derivative(model_with(Gate(function())), "encoder.0", torch.zeros(2, 3, *SIZE))


def test_a_network_with_hard_sigmoids_is_refused_when_built_with_penalties() -> None:
    name, encoder = "encoder.blocks.2", "mobilenetv3_small_050"
    with pytest.raises(ValueError, match="hardsigmoid_backward"):
        build(encoder, name)
    assert representation_module(build(encoder, name, penalized=False), name)
    assert build(encoder, "encoder").representation == "encoder"
