"""timm encoders: construction, checks, and weights from the hub or a file.

Owns everything that asks timm for something. State-dict names are those of timm's own network: the
output is shaped by timm's options or by a forward hook, never by a wrapper.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repmtl_ray.config import OWN_MODEL, SEGNET, ModelConfig, nearest
from repmtl_ray.data.columns import Inputs
from repmtl_ray.models.packaged import EFFICIENTNET_LITE0, ENCODER, packaged_file, renamed_weights
from repmtl_ray.user_code import failure_of

_logger = logging.getLogger(__name__)
_NUM_DIMS = {"map": 4, "pooled": 2, "tokens": 3}
_HUB_TIMEOUT = 4.0  # seconds


def build_encoder(config: ModelConfig, image_size: tuple[int, int]) -> tuple[nn.Module, int]:
    """An encoder that maps images [rows, 3, H, W] to what `config.features` says.

    "map": the network's last feature map, channels first. "pooled": what its own classifier would
    see. "tokens": all tokens after the last norm; class and register tokens come first and stay.

    Args:
        config: encoder, features, output_stride (for maps only), pretrained, weights.
        image_size: (height, width) that the encoder will see.

    Returns:
        The encoder, and the number of channels it hands over.

    Raises:
        ValueError: see `build_model`.
    """
    check_available(config)
    try:
        encoder = _create(config, image_size, pretrained=config.pretrained)
    except OSError as error:
        raise ValueError(_unreachable(config.encoder, error)) from error
    if config.weights is not None:
        encoder = _load_weights(encoder, config, image_size)
    if config.batch_norm_momentum is not None:
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = config.batch_norm_momentum
    if config.features == "map":
        encoder.register_forward_hook(_last_map)
    elif config.features == "tokens":
        _stop_pooling(encoder, config.encoder)
    return encoder, _check_features(encoder, config, image_size)


def check_available(config: ModelConfig) -> None:
    """Whether the encoder and its weights can be had; builds nothing.

    Raises:
        ValueError: a name that timm does not know, weights that are not published or out of reach, or
            a file that does not exist.
    """
    architecture = config.encoder.split(".")[0]
    if config.encoder not in (SEGNET, OWN_MODEL) and not timm.is_model(architecture):
        raise ValueError(
            f"model.encoder is {config.encoder!r}, which timm does not know; "
            f"{similar_names(architecture, timm.list_models())}"
        )
    if config.pretrained:
        _require_published_weights(config.encoder)
    if config.weights == EFFICIENTNET_LITE0:
        packaged_file()
    elif config.weights is not None and not Path(config.weights).expanduser().is_file():
        raise ValueError(f"model.weights '{config.weights}': no such file.")


def similar_names(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest names, or that there are none."""
    hint = nearest(name, known)
    return hint if len(hint) < 300 else "no name is similar."


def blank_forward(encoder: nn.Module, image_size: tuple[int, int], num_images: int = 1) -> Tensor:
    """Blank images through an encoder in eval mode; leaves no trace."""
    images = next(encoder.parameters()).new_zeros(num_images, 3, *image_size)
    return forward_once(encoder, images)


@torch.no_grad()
def forward_once(encoder: nn.Module, inputs: Inputs) -> Any:
    """Inputs through an encoder in eval mode; leaves no trace."""
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        encoder.eval()
        return encoder(**inputs) if isinstance(inputs, Mapping) else encoder(inputs)
    finally:
        for module, mode in modes:
            module.training = mode


def keeps_channels_last(network: nn.Module) -> bool:
    """Whether timm says that the network's maps are [rows, H', W', C]."""
    return str(getattr(network, "output_fmt", "")).endswith("NHWC")


def encoder_arguments(config: ModelConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """What `timm.create_model` is given for an encoder besides its name and weights."""
    arguments: dict[str, Any] = {"num_classes": 0}
    if config.features == "map":
        arguments = {"features_only": True, "out_indices": (-1,)}
        if config.output_stride is not None:
            arguments["output_stride"] = config.output_stride
    if has_fixed_size(config):
        arguments["img_size"] = image_size
    return arguments


def _create(config: ModelConfig, image_size: tuple[int, int], **arguments: Any) -> nn.Module:
    try:
        arguments |= encoder_arguments(config, image_size)
        return timm.create_model(config.encoder, **arguments)
    except (AssertionError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        hint = ""
        if "output_stride" in arguments:
            hint = (
                f" at output_stride {config.output_stride}; encoders that cannot dilate need "
                "model.output_stride null"
            )
        raise ValueError(
            f"model.encoder {config.encoder!r} cannot give features {config.features!r} of "
            f"{_size(image_size)} images{hint} ({failure_of(error)})."
        ) from error


def has_fixed_size(config: ModelConfig) -> bool:
    """Whether the encoder is built for one image size (position embeddings, windows)."""
    if config.encoder == SEGNET:
        return False
    published = timm.get_pretrained_cfg(config.encoder)
    return published is not None and bool(published.fixed_input_size)


def _size(image_size: tuple[int, int]) -> str:
    return f"{image_size[0]}x{image_size[1]}"


def _last_map(network: nn.Module, _inputs: Any, output: Any) -> Tensor:
    """Forward hook: from timm's list of maps to the last one, channels first."""
    last: Tensor = output[-1]
    return last.permute(0, 3, 1, 2) if keeps_channels_last(network) else last


def _stop_pooling(encoder: Any, name: str) -> None:
    try:
        encoder.reset_classifier(0, "")
    except (AssertionError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.encoder {name!r} does not hand over tokens ({failure_of(error)})."
        ) from error


def _check_features(encoder: nn.Module, config: ModelConfig, image_size: tuple[int, int]) -> int:
    """The number of channels that heads receive."""
    try:
        features: Any = blank_forward(encoder, image_size)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model.encoder {config.encoder!r} does not run on {_size(image_size)} images "
            f"({failure_of(error)})."
        ) from error
    expected = _NUM_DIMS[config.features]
    if not isinstance(features, Tensor) or features.ndim != expected:
        output = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"model.encoder {config.encoder!r} hands over {output} for one image; features "
            f"{config.features!r} need {expected} dimensions. Choose other features."
        )
    if config.features != "map":
        return features.shape[2 if config.features == "tokens" else 1]
    info: Any = encoder.feature_info
    if features.shape[1] != info.channels()[-1]:
        raise ValueError(
            f"model.encoder {config.encoder!r} hands over a map of shape {tuple(features.shape)}, but timm says that it has "
            f"{info.channels()[-1]} channels, so its layout is not known. Choose another encoder."
        )
    if config.output_stride is not None:
        stride = info.reduction()[-1]
        if stride != config.output_stride:
            raise ValueError(
                f"model.encoder {config.encoder!r} has stride {stride} and does not change it to "
                f"output_stride {config.output_stride}; set model.output_stride to null."
            )
    return features.shape[1]


def _require_published_weights(encoder: str) -> None:
    """Fails within seconds where timm would retry for half a minute without a network."""
    try:
        published = timm.get_pretrained_cfg(encoder)
    except RuntimeError as error:
        raise ValueError(f"model.encoder {encoder!r}: {error}") from error
    if published is None or not published.has_weights:
        raise ValueError(
            f"model.pretrained: timm publishes no weights for {encoder!r}; "
            "give model.weights a local file."
        )
    if not published.hf_hub_id:
        return  # a plain URL, which timm tries once
    repository, _, revision = published.hf_hub_id.partition("@")
    files = ["model.safetensors", "pytorch_model.bin"]
    if published.hf_hub_filename:
        files = [published.hf_hub_filename]
    cached = [huggingface_hub.try_to_load_from_cache(repository, name) for name in files]
    if any(isinstance(path, str) for path in cached):
        return
    url = huggingface_hub.hf_hub_url(repository, files[0], revision=revision or None)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT)
    except EntryNotFoundError:
        return  # another of the files, then; timm tries them in turn
    except Exception as error:  # of the HTTP library, which changes by version
        raise ValueError(_unreachable(encoder, error)) from error


def _unreachable(encoder: str, error: Exception) -> str:
    return (
        f"model.pretrained: the weights of {encoder!r} are neither in the local cache nor within "
        f"reach ({failure_of(error)}); give model.weights a local .pth or .safetensors file instead."
    )


def _load_weights(
    encoder: nn.Module, config: ModelConfig, image_size: tuple[int, int]
) -> nn.Module:
    """The encoder with the weights of `config.weights`.

    A new one where their shapes differ: timm then resizes position embeddings to the image size.
    """
    path = Path(str(config.weights)).expanduser()
    is_packaged = config.weights == EFFICIENTNET_LITE0
    state = efficientnet_lite0() if is_packaged else _read_state(path)
    own = encoder.state_dict()
    # By name in the encoder, the key in the file: timm's feature networks rename entries.
    key_of = {name: key for key in state for name in _names_in_encoder(key) if name in own}
    missing = [
        name for name in own if name not in key_of and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise ValueError(
            f"model.weights '{path}' lacks {len(missing)} of {len(own)} entries of "
            f"{config.encoder!r}: {_first(missing)}. It holds {_first(list(state))}."
        )
    _check_unused_entries(path, state, set(key_of.values()), config.encoder)
    check_tensors(
        f"model.weights '{path}'",
        {key: state[key] for key in key_of.values()},
        {key: own[name] for name, key in key_of.items()},
    )
    misfits = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[name].shape)}"
        for name, key in key_of.items()
        if state[key].shape != own[name].shape
    ]
    if not misfits:
        encoder.load_state_dict({name: state[key] for name, key in key_of.items()}, strict=False)
        return encoder
    try:
        overlay = {"state_dict": state}
        return _create(config, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"model.weights '{path}' does not fit {config.encoder!r}: {_first(misfits)}."
        ) from error


def efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of timm's tf_efficientnet_lite0, from the package of the extra `pretrained`.

    They expect images in -1..1 (`ModelConfig.input_scale` "symmetric").

    Raises:
        ValueError: as `renamed_weights`.
    """
    packaged_file()  # before a network is built for its names
    return renamed_weights(timm.create_model(ENCODER).state_dict())


def _check_unused_entries(
    path: Path, state: Mapping[str, Tensor], used: Collection[str], encoder: str
) -> None:
    """Warns of entries that the encoder does not use, and refuses those of another network.

    A classifier and whole modules that the encoder lacks are left out. A weight beside used ones
    says that the file is of a deeper or other network.
    """
    unused = [key for key in state if key not in used]
    parts = {key.split(".")[0] for key in used}
    foreign = [
        key
        for key in unused
        if key.split(".")[0] in parts and not key.startswith("head") and key.endswith(".weight")
    ]
    if foreign:
        raise ValueError(
            f"model.weights '{path}' is of another network than {encoder!r}: "
            f"it also holds {_first(foreign)}."
        )
    if unused:
        _logger.warning("%s: left out %s", path, _first(unused))


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"model.weights '{path}': no such file.")
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # pickle, zip and safetensors have their own kinds
        raise ValueError(
            f"model.weights '{path}' cannot be read as a state dict ({failure_of(error)})."
        ) from error
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.startswith("encoder.") for key in state):  # a whole MultiTaskModel
        encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
        state = {key.removeprefix("encoder."): value for key, value in encoder.items()}
    if not state:
        raise ValueError(
            f"model.weights '{path}' holds no tensors; expected a state dict, bare or under "
            "'state_dict' or 'model'."
        )
    return state


def check_tensors(
    where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Refuses values that no model can be trained or read from.

    Args:
        where: what messages call the file.
        tensors: by name.
        expected: by name; decide whether numbers are to be floats, and of which size. A name that
            only one of the two has is none of this function's business.

    Raises:
        ValueError: names a tensor that is of another kind of number, or not finite as the model
            would hold it.
    """
    for name in sorted(tensors.keys() & expected.keys()):
        tensor, dtype = tensors[name], expected[name].dtype
        if tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
            raise ValueError(
                f"{where}: {name} is {tensor.dtype}; expected {dtype}. The file is damaged or quantised."
            )
        if dtype.is_floating_point:
            num_wrong = int((~tensor.to(dtype).isfinite()).sum())
            if num_wrong and bool(expected[name].isfinite().all()):  # an attention mask may be -inf
                raise ValueError(
                    f"{where}: {name} holds {num_wrong} of {tensor.numel()} values that are not finite as "
                    f"{dtype}. The training that wrote it diverged, or the file is damaged: take another file."
                )


def _names_in_encoder(key: str) -> tuple[str, ...]:
    """What timm's feature wrappers may call an entry of the plain network."""
    return key, f"model.{key}", f"body.{key}", key.replace(".", "_", 1)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
