"""The representation of a model: which module's output it is, its channel axis, its derivatives.

Owns what is found out about the representation when a model is built, by running the encoder on
blank images. Nothing is guessed from names: what cannot be decided is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from repmtl_ray.data.columns import Inputs
from repmtl_ray.models.encoders import forward_once, similar_names
from repmtl_ray.user_code import failure_of

NUM_IMAGES = 2
"""Blank images per run: a first axis of this length is the batch."""


def representation_module(model: nn.Module, name: str) -> nn.Module:
    """The module whose output is the representation.

    Args:
        model: a `MultiTaskModel`.
        name: "encoder", or the dotted name of a module inside it, for example "encoder.layer4".

    Raises:
        ValueError: no such module in the encoder; the nearest names are offered.
    """
    modules = {
        path: module for path, module in model.named_modules() if f"{path}.".startswith("encoder.")
    }
    if name not in modules:
        raise ValueError(
            f"model.representation is {name!r}, which names no module of the encoder; "
            f"{similar_names(name, modules)}"
        )
    return modules[name]


@contextlib.contextmanager
def second_derivatives_of_attention() -> Iterator[None]:
    """Attention inside is computed by plain matrix products, which can be differentiated twice.

    PyTorch's fused kernels of `scaled_dot_product_attention` have no second derivative.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


def allow_second_derivatives(encoder: nn.Module) -> None:
    """Prepares an encoder for a representation inside it: what follows is differentiated twice.

    Fused attention has no second derivative; an activation in place could overwrite the
    representation.
    """
    for module in encoder.modules():
        for option in ("fused_attn", "inplace"):
            if hasattr(module, option):
                setattr(module, option, False)


def blank_images(model: nn.Module, image_size: tuple[int, int]) -> Tensor:
    """[NUM_IMAGES, 3, H, W] zeros for a model."""
    return next(model.parameters()).new_zeros(NUM_IMAGES, 3, *image_size)


def output_shape(model: nn.Module, name: str, inputs: Inputs) -> tuple[int, ...]:
    """The shape of a module's output for one sample, without the rows.

    Args:
        model: a `MultiTaskModel`; only its encoder runs, in eval mode.
        name: of the module, as for `representation_module`.
        inputs: of `NUM_IMAGES` rows.

    Raises:
        ValueError: an output that cannot be the representation.
    """
    outputs: list[tuple[Any, int]] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((output, output._version if isinstance(output, Tensor) else 0))

    encoder = model.get_submodule("encoder")
    handle = representation_module(model, name).register_forward_hook(record)
    try:
        forward_once(encoder, inputs)
    finally:
        handle.remove()
    output, version = outputs[0] if outputs else (None, 0)
    problem = ""
    if len(outputs) != 1:
        problem = f"runs {len(outputs)} times in a forward pass; expected once"
    elif not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        problem = "does not hand over one tensor of 2 to 4 dimensions; take another module"
    elif output._version != version:
        problem = "hands over a tensor that is changed in place later; take the module around it"
    elif output.shape[0] != NUM_IMAGES:
        problem = (
            f"hands over {output.shape[0]} rows for {NUM_IMAGES} images, so its first axis is not the "
            "batch (windows or heads, for example); take the module around it"
        )
    if problem:
        raise ValueError(f"model.representation {name!r} {problem}.")
    assert isinstance(output, Tensor)
    return tuple(output.shape[1:])


def channel_axis(
    name: str, shape: tuple[int, ...], other_shape: Callable[[], tuple[int, ...]]
) -> int:
    """The axis of the channels, counted with the rows.

    Positions become more with the image's size, and channels do not. So the channel axis is the
    only one, of those longer than 1, whose length is the same at another size.

    Args:
        name: of the module, for messages.
        shape: of its output, without the rows.
        other_shape: finds the same at an image size at which every map has other sides.

    Raises:
        ValueError: no such axis, or several.
    """
    if len(shape) == 1:
        return 1
    other = other_shape()
    axes = [
        axis
        for axis, length in enumerate(shape, start=1)
        if length > 1 and len(other) == len(shape) and other[axis - 1] == length
    ]
    if len(axes) != 1:
        raise ValueError(
            f"model.representation {name!r}: its output has shape {shape} for one image and {other} for a larger one, from "
            "which its channel axis cannot be told (it alone keeps its length). Take the module before or after it."
        )
    return axes[0]


def check_second_derivative(model: nn.Module, name: str, inputs: Inputs) -> None:
    """Differentiates what follows the representation twice, in eval mode.

    Args:
        model: a `MultiTaskModel`, complete with heads.
        name: of the representation's module.
        inputs: of `NUM_IMAGES` rows.

    Raises:
        ValueError: an operation in between has no second derivative; PyTorch names it.
    """
    leaves: list[Tensor] = []

    def begin_graph(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    modes = [(module, module.training) for module in model.modules()]
    handle = representation_module(model, name).register_forward_hook(begin_graph)
    try:
        with torch.enable_grad():
            predictions = model.eval()(inputs)
            # Squares, so that the loss of a linear head has a second derivative too.
            total = torch.stack([p.square().mean() for p in predictions.values()]).sum()
            (saliency,) = torch.autograd.grad(total, leaves, create_graph=True)
            _refuse_delayed_errors(saliency)
            torch.autograd.grad(saliency.square().sum(), leaves, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            f"model.representation {name!r}: an operation after it has no second derivative, which Rep-MTL's penalties "
            f"need ({failure_of(error)}). Take the representation after that operation ('encoder' is after all), "
            "another encoder, or set regularizer.lambda_tsr and regularizer.lambda_csa to 0."
        ) from error
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode


def _refuse_delayed_errors(tensor: Tensor) -> None:
    """Raises what PyTorch would raise for a function that is differentiable once, if it got there.

    The node that raises (`once_differentiable`) is not on the way to any leaf, so a derivative that
    is asked for by leaf comes out as None, as if there were no dependence.

    Raises:
        RuntimeError: there is such a function.
    """
    seen: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "Error":
            raise RuntimeError("a function marked with @once_differentiable")
        waiting += [before for before, _ in node.next_functions]
