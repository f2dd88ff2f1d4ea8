"""How a device computes the encoder in training: in parts, with recomputed activations, compiled, or
with channels last.

Owns what `ComputeConfig` does to a model. The modules and the names of their parameters stay as they
are: only what the encoder's `forward` does in training changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repmtl_ray.config import ComputeConfig, ExperimentError
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import GlobalBatchNorm


def autocast_to(precision: str, device: torch.device) -> torch.autocast:
    """The block in which a model computes; in half precision where the precision says so.

    Args:
        precision: as in `Experiment`.
        device: of the model.
    """
    low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    return torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None)


def use_compute(model: MultiTaskModel, config: ComputeConfig) -> None:
    """Makes a model compute as a configuration says; in place.

    The encoder's backward pass runs its forward pass again where activations are not kept.
    `frozen_statistics` has to surround it (`GraphSplit.backward_to`).

    Args:
        model: on its device.
        config: see there.

    Raises:
        ExperimentError: an encoder that offers no checkpointing.
    """
    encoder = model.encoder
    if config.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:  # maps follow their kernels
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if config.checkpointing:
        _checkpoint_stages(encoder)
    as_written = forward = encoder.forward
    if config.compile:
        forward = _compiled(encoder)
    if config.encoder_parts > 1:
        forward = _in_parts(forward, config.encoder_parts)
    if forward is not as_written:
        # Evaluation computes as written: it would need programs of its own, and keeps nothing.
        encoder.forward = lambda *inputs, **named: (forward if encoder.training else as_written)(
            *inputs, **named
        )


def _checkpoint_stages(encoder: nn.Module) -> None:
    """Turns on timm's checkpointing, in the encoder or in the network inside it."""
    network = next((m for m in encoder.modules() if hasattr(m, "set_grad_checkpointing")), None)
    try:
        assert network is not None
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # how timm's networks refuse
        raise ExperimentError(
            f"compute.checkpointing is True, but the encoder ({type(encoder).__name__}) offers no checkpointing "
            "(timm's set_grad_checkpointing). Leave it out; compute.encoder_parts saves memory with any encoder."
        ) from error
    for module in encoder.modules():
        # Some releases of timm (1.0.29) checkpoint a stem's activation alone. In place, it would
        # overwrite the input that its second forward pass starts from; autograd refuses that.
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]


def _compiled(encoder: nn.Module) -> Callable[..., Any]:
    from torch._functorch import config as functorch_config  # here, because it takes long to load

    # A policy may differentiate the encoder several times, so its graph is kept; compiled backward
    # passes must not reuse what it holds. (torch's own error names this switch.)
    functorch_config.donated_buffer = False
    for layer in encoder.modules():
        if isinstance(layer, GlobalBatchNorm) and layer.workers.size > 1:
            # Messages to other workers stay outside the compiled programs.
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    # `forward`, not the module: its hooks, one of which splits the graph, are called outside.
    return torch.compile(encoder.forward)


def _in_parts(forward: Callable[..., Any], num_parts: int) -> Callable[..., Any]:
    """The same function, on parts of the rows and without kept activations.

    A part has every `num_parts`-th row, so that the parts of the global batch do not depend on the
    number of workers.
    """

    def on_parts(*inputs: Tensor, **named: Tensor) -> Any:
        num_rows = len(inputs[0] if inputs else next(iter(named.values())))
        if num_rows % num_parts:
            raise ExperimentError(
                f"compute.encoder_parts is {num_parts}, but a worker's part of the batch has {num_rows} rows, which it does "
                "not divide. Take another batch_size, or another number of workers or parts."
            )
        outputs = [
            checkpoint(
                partial(forward, **{name: rows[first::num_parts] for name, rows in named.items()}),
                *(rows[first::num_parts] for rows in inputs),
                use_reentrant=False,
            )
            for first in range(num_parts)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs, dim=1).flatten(0, 1)
        # A network's feature maps, one by one.
        return [torch.stack(maps, dim=1).flatten(0, 1) for maps in zip(*outputs, strict=True)]

    return on_parts
