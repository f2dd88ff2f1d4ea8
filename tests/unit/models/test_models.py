"""What timm's encoders hand over, what heads make of it, which weights fit, and every refusal."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from repmtl_ray.config import ModelConfig
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.models.heads import ASPPHead, LinearHead
from repmtl_ray.models.representation import representation_module
from repmtl_ray.tasks import Classification, Depth, Segmentation, Task

SIZE = (64, 96)
DENSE: list[Task] = [Segmentation(name="segmentation", num_classes=7), Depth(name="depth")]
LABEL: list[Task] = [Classification(name="amazon", num_classes=5)]


def _config(encoder: str = "resnet18", **arguments: Any) -> ModelConfig:
    defaults = {"output_stride": None, "head": "linear"}
    return ModelConfig(encoder=encoder, **defaults | arguments)


def _build(
    encoder: str = "resnet18",
    tasks: list[Task] | None = None,
    size: tuple[int, ...] = SIZE,
    **arguments: Any,
) -> Any:
    tasks = DENSE if tasks is None else tasks
    return build_model(_config(encoder, **arguments), tasks, image_size=size)


@pytest.fixture(scope="module")
def paper_model() -> MultiTaskModel:
    """The `libmtl` protocol's model."""
    return build_model(ModelConfig(), DENSE, image_size=SIZE)


def test_the_papers_encoder_and_head_have_the_papers_sizes(paper_model: MultiTaskModel) -> None:
    assert paper_model.num_encoder_parameters == 23_508_032
    assert paper_model.representation_shape == (2048, 8, 12)
    assert paper_model.channel_axis == 1
    sizes = [sum(p.numel() for p in head.parameters()) for head in paper_model.heads.values()]
    assert all(abs(size - 16.1e6) < 0.1e6 for size in sizes)
    assert paper_model.training


def test_dense_predictions_are_at_image_size(paper_model: MultiTaskModel) -> None:
    with torch.no_grad():
        found = paper_model(torch.randn(1, 3, *SIZE))  # one row, in training mode
    shapes = {task: tuple(prediction.shape) for task, prediction in found.items()}
    assert shapes == {"segmentation": (1, 7, *SIZE), "depth": (1, 1, *SIZE)}


MAPS = {
    "resnet18": (512, 2, 3),
    "mobilenetv3_small_100": (576, 2, 3),
    "convnext_atto": (320, 2, 3),
    "regnety_002": (368, 2, 3),
    "densenet121": (1024, 2, 3),
    "vit_tiny_patch16_224": (192, 4, 6),
    "swin_tiny_patch4_window7_224": (768, 2, 3),
}


@pytest.mark.parametrize("encoder", list(MAPS))
def test_maps_are_channels_first_and_use_every_parameter(encoder: Any) -> None:
    model = _build(encoder)
    assert model.representation_shape == MAPS[encoder]
    model.eval()(torch.randn(2, 3, *SIZE))["depth"].sum().backward()
    assert [n for n, p in model.encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet_b0", "convnext_atto"])
@pytest.mark.parametrize("stride", [8, 16])
def test_encoders_that_can_dilate_keep_the_stride(encoder: str, stride: int) -> None:
    model = _build(encoder, output_stride=stride)
    assert model.representation_shape[1:] == (SIZE[0] // stride, SIZE[1] // stride)


@pytest.mark.parametrize(
    "encoder", ["vgg11", "densenet121", "vit_tiny_patch16_224", "hrnet_w18_small"]
)
def test_encoders_that_cannot_dilate_say_so(encoder: str) -> None:
    with pytest.raises(ValueError, match=f"{encoder}.*output_stride.*null"):
        _build(encoder, output_stride=8)


@pytest.mark.parametrize(("encoder", "width"), [("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_pooled_features_are_vectors(encoder: str, width: int) -> None:
    model = _build(encoder, LABEL, features="pooled", output_stride=8)  # a stride is for maps
    assert model.representation_shape == (width,)
    assert model.channel_axis == 1
    assert model(torch.randn(2, 3, *SIZE))["amazon"].shape == (2, 5)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_tokens_keep_the_class_token_and_are_normalised(encoder: str) -> None:
    model = _build(encoder, LABEL, size=(32, 48), features="tokens")
    assert model.representation_shape[0] == 1 + 2 * 3
    assert model.channel_axis == 2
    tokens = model.encoder(torch.randn(2, 3, 32, 48))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
    model(torch.randn(2, 3, 32, 48))["amazon"].sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("features", ["map", "pooled"])
def test_a_linear_head_reads_labels_from_maps_and_vectors(features: str) -> None:
    model = _build(tasks=LABEL, features=features)
    assert isinstance(model.heads["amazon"], LinearHead)
    assert model(torch.randn(3, 3, *SIZE))["amazon"].shape == (3, 5)


def test_rows_say_who_predicts_for_what() -> None:
    tasks: list[Task] = [*LABEL, Classification(name="dslr", num_classes=3)]
    model = _build(tasks=tasks, features="pooled").eval()
    images = torch.randn(5, 3, *SIZE)
    whole = model(images)
    found = model(images, {"amazon": slice(0, 3), "dslr": slice(3, 5)})
    torch.testing.assert_close(found["amazon"], whole["amazon"][:3])
    torch.testing.assert_close(found["dslr"], whole["dslr"][3:])
    assert list(model(images, {"dslr": slice(3, 5)})) == ["dslr"]
    torch.testing.assert_close(model.predict("dslr", model.encoder(images), SIZE), whole["dslr"])


def test_the_same_seed_gives_the_same_model() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(_build().state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["encoder.conv1.weight"], states[2]["encoder.conv1.weight"])


def test_building_leaves_no_trace_in_running_statistics() -> None:
    state = _build().state_dict()
    counts = [v for n, v in state.items() if n.endswith("num_batches_tracked")]
    assert counts
    assert not any(bool(count) for count in counts)


def test_models_can_be_copied_and_saved() -> None:
    model = _build().eval()
    images = torch.randn(1, 3, *SIZE)
    torch.testing.assert_close(copy.deepcopy(model)(images)["depth"], model(images)["depth"])


# Heads


@pytest.mark.parametrize("rows", [1, 2])
def test_aspp_trains_on_any_number_of_rows_to_second_order(rows: int) -> None:
    torch.manual_seed(0)
    head = ASPPHead(4, 3, width=5, rates=(1, 2), dropout=0.0).double()
    features = torch.randn(rows, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: head(z).square().sum(), features)
    (saliency,) = torch.autograd.grad(head(features).square().sum(), features, create_graph=True)
    saliency.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_aspp_sees_the_whole_image_through_its_pooled_branch() -> None:
    torch.manual_seed(0)
    head = ASPPHead(2, 1, width=16, rates=(1,), dropout=0.0).eval()
    features = torch.randn(1, 2, 1, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(head(features)[0, 0, 0, 0], features)
    assert gradient[..., -1].abs().sum() > 0


# The representation


@pytest.mark.parametrize("name", ["encoder.layer3", "encoder.layer4.1", "encoder.layer4.0.conv1"])
def test_named_representations_of_a_cnn(name: str) -> None:
    model = _build(representation=name)
    seen = []
    module = representation_module(model, name)
    module.register_forward_hook(lambda _, __, output: seen.append(output))
    model(torch.randn(2, 3, *SIZE))
    assert tuple(seen[0].shape[1:]) == model.representation_shape
    assert model.representation == name


@pytest.mark.parametrize(
    ("encoder", "name", "shape", "axis"),
    [
        ("vit_tiny_patch16_224", "encoder.model.blocks.10", (25, 192), 2),
        ("swin_tiny_patch4_window7_224", "encoder.layers_2", (4, 6, 384), 3),
    ],
)
def test_a_representation_before_attention_has_second_derivatives(
    encoder: str, name: str, shape: tuple[int, ...], axis: int
) -> None:
    model = _build(encoder, representation=name)
    assert model.representation_shape == shape
    assert model.channel_axis == axis
    seen = []
    representation_module(model, name).register_forward_hook(lambda *a: seen.append(a[2]))
    loss = model(torch.randn(1, 3, *SIZE))["depth"].square().mean()
    (saliency,) = torch.autograd.grad(loss, seen[0], create_graph=True)
    saliency.square().sum().backward()
    assert model.heads["depth"].output.weight.grad is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layer5", "names no module of the encoder; did you mean .*'encoder.layer4'"),
        ("heads.depth", "names no module of the encoder"),
        ("encoder.layer4.1.bn2", "changed in place later; take the module around it"),
    ],
)
def test_modules_that_cannot_be_the_representation_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(representation=name)


# Refusals


@pytest.mark.parametrize(
    ("encoder", "arguments", "message"),
    [
        ("resnet5O", {}, "'resnet5O', which timm does not know; did you mean .*'resnet50'"),
        ("qqqqqqqqqq", {}, "which timm does not know; no name is similar"),
        ("resnet50.nothing", {}, "Invalid pretrained tag"),
        ("resnet18", {"features": "tokens"}, r"hands over \(1, 512, 2, 3\).*need 3 dimensions"),
        ("resnet18", {"head": "linear", "features": "pooled"}, "set model.features to 'map'"),
        ("vit_tiny_patch16_224", {"size": (8, 8)}, "vit_tiny_patch16_224.*8x8"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    encoder: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _build(encoder, **arguments)


def test_task_names_are_unique() -> None:
    with pytest.raises(ValueError, match="tasks 'depth', 'depth': names must differ"):
        _build(tasks=[DENSE[1], DENSE[1]])


def test_aspp_is_for_dense_tasks() -> None:
    with pytest.raises(ValueError, match=r"'amazon' predicts no map: set model\.head to 'linear'"):
        _build(tasks=LABEL, head="aspp")


# Weights


def _plain(encoder: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(11)
    return timm.create_model(encoder, **arguments)


def _save(state: dict, path: Path, form: str) -> str:
    if form == "safetensors":
        save_file(state, path := path.with_suffix(".safetensors"))
        return str(path)
    forms = {
        "bare": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "model": {"model": {f"module.{name}": value for name, value in state.items()}},
        "encoder": {f"encoder.{name}": v for name, v in state.items()} | {"heads.x": torch.ones(1)},
    }
    torch.save(forms[form], path)
    return str(path)


@pytest.mark.parametrize("form", ["bare", "state_dict", "model", "encoder", "safetensors"])
def test_weights_are_read_from_every_common_form(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _plain("resnet18")
    path = _save(plain.state_dict(), tmp_path / "weights.pth", form)
    with caplog.at_level(logging.WARNING):
        model = _build(weights=path).eval()
    images = torch.randn(1, 3, *SIZE)
    torch.testing.assert_close(model.encoder(images), plain.eval().forward_features(images))
    assert "left out fc." in caplog.text


@pytest.mark.parametrize("encoder", ["convnext_atto", "mobilenetv3_small_100", "densenet121"])
def test_weights_find_their_place_in_timms_feature_networks(encoder: str, tmp_path: Path) -> None:
    plain = _plain(encoder)
    path = _save(plain.state_dict(), tmp_path / "weights.pth", "bare")
    reference = timm.create_model(
        encoder, features_only=True, out_indices=(-1,), pretrained=True,
        pretrained_cfg_overlay={"state_dict": plain.state_dict()},
    )  # fmt: skip
    images = torch.randn(1, 3, *SIZE)
    found = _build(encoder, weights=path).eval().encoder(images)
    torch.testing.assert_close(found, reference.eval()(images)[-1])


@pytest.mark.parametrize("features", ["map", "pooled", "tokens"])
def test_position_embeddings_are_resized(features: str, tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    plain = _plain(name)
    path = _save(plain.state_dict(), tmp_path / "weights.pth", "bare")
    tasks = DENSE if features == "map" else LABEL
    state = _build(name, tasks, features=features, weights=path).encoder.state_dict()
    prefix = "model." if features == "map" else ""
    assert state[f"{prefix}pos_embed"].shape == (1, 25, 192)
    block = "blocks.5.attn.qkv.weight"
    assert torch.equal(state[prefix + block], plain.state_dict()[block])
    assert not torch.equal(state[f"{prefix}pos_embed"], plain.state_dict()["pos_embed"][:, :25])


def test_a_models_own_weights_come_back(tmp_path: Path) -> None:
    model = _build("convnext_atto")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = _build("convnext_atto", weights=str(tmp_path / "model.pth"))
    for name, value in again.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(dtype: Any, tmp_path: Path) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in _plain("resnet18").state_dict().items()
    }
    encoder = _build(weights=_save(state, tmp_path / "weights.pth", "bare")).encoder
    for name, value in encoder.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, state[name].to(value.dtype))


def _wrong_weights(case: str, folder: Path) -> str:
    path = folder / "weights.pth"
    state = _plain("resnet18").state_dict()
    if case == "missing":
        state = {name: value for name, value in state.items() if "layer4.1" not in name}
    elif case == "deeper":
        state = _plain("resnet34").state_dict()
    elif case == "wider":
        state["layer4.1.conv2.weight"] = torch.zeros(512, 256, 3, 3)
    elif case in ("nan", "inf"):
        state["layer4.1.bn2.running_var"][3:5] = float(case)
    elif case == "integers":
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].mul(100).to(torch.int8)
    elif case == "complex":
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.complex64)
    elif case == "beyond float32":
        state["bn1.bias"] = torch.full((64,), 1e300, dtype=torch.float64)
    elif case == "empty":
        state = {}
    elif case == "pickle":
        torch.save({"model": Segmentation(name="x", num_classes=2)}, path)
        return str(path)
    if case != "no file":
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"lacks 10 of \d+ entries of 'resnet18': layer4.1.conv1.weight, .* and 6 more"),
        ("deeper", "of another network than 'resnet18': it also holds layer1.2.conv1.weight"),
        ("wider", r"layer4.1.conv2.weight \(512, 256, 3, 3\) instead of \(512, 512, 3, 3\)"),
        ("nan", r"layer4.1.bn2.running_var holds 2 of 512 values that are not finite"),
        ("inf", r"layer4.1.bn2.running_var holds 2 of 512 values that are not finite"),
        ("integers", r"layer1.0.conv1.weight is torch.int8; expected torch.float32"),
        ("complex", r"layer1.0.conv1.weight is torch.complex64; expected torch.float32"),
        ("beyond float32", r"bn1.bias holds 64 of 64 values that are not finite as torch.float32"),
        ("empty", "holds no tensors"),
        ("pickle", "cannot be read as a state dict"),
        ("no file", "no such file"),
    ],
)
def test_weights_that_do_not_fit_are_refused(case: str, message: str, tmp_path: Path) -> None:
    path = _wrong_weights(case, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        _build(weights=path)
    assert path in str(caught.value)


def test_published_weights_without_a_network_are_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def unreachable(*_: Any, **__: Any) -> None:
        asked.append("metadata")
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    message = "'resnet18'.*neither in the local cache nor within reach.*give model.weights a local"
    with pytest.raises(ValueError, match=message):
        _build(pretrained=True)
    assert asked == ["metadata"]


def test_an_encoder_without_published_weights_says_so() -> None:
    names = [name for name in timm.list_models("vit_*") if not timm.list_pretrained(name)]
    bare = next(n for n in names if not getattr(timm.get_pretrained_cfg(n), "has_weights", False))
    with pytest.raises(ValueError, match=f"no weights for '{bare}'"):
        _build(bare, pretrained=True)
