"""Models of the user's own: any encoder with one head for every task.

Owns `Model`, and what is checked when one is built: everything that would otherwise show after hours
or as an error deep inside PyTorch. The model runs once on two samples of its own data for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ModelConfig
from repmtl_ray.conversion import check
from repmtl_ray.data.columns import Inputs
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import use_global_statistics
from repmtl_ray.models.heads import HasHead
from repmtl_ray.models.representation import (
    allow_second_derivatives,
    check_second_derivative,
    output_shape,
    representation_module,
)
from repmtl_ray.user_code import failure_of, is_message


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a model function returns: any modules, on the CPU, freshly initialised.

    Args:
        encoder: what all tasks share. Its argument is the input, or, of several inputs, each by its
            name; its output is the representation, [B, C], [B, C, H, W] or [B, N, C], unless
            `ModelConfig.representation` names a module inside it.
        heads: by the task's name; from the encoder's output to [B, num_outputs], or to maps [B,
            num_outputs, H, W] for tasks that predict them. They share no parameters.
        channel_axis: of the representation, counted with the batch; None takes 1 for [B, C] and [B,
            C, H, W], and 2 for [B, N, C].
    """

    encoder: nn.Module
    heads: Mapping[str, nn.Module]
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        is_module = isinstance(self.encoder, nn.Module)
        check(is_module, "Model.encoder", self.encoder, "a torch.nn.Module")
        check(isinstance(self.heads, Mapping), "Model.heads", self.heads, "a head by task name")
        for task, head in self.heads.items():
            check(isinstance(head, nn.Module), f"Model.heads[{task!r}]", head, "a torch.nn.Module")
        is_axis = self.channel_axis is None or self.channel_axis in (1, 2, 3)
        check(is_axis, "Model.channel_axis", self.channel_axis, "1, 2, 3 or None")


ModelFunction: TypeAlias = Callable[[], Model]
"""Makes a model; called on every worker under the seed of the run."""


def build_own_model(
    make: ModelFunction,
    config: ModelConfig,
    tasks: Sequence[HasHead],
    *,
    inputs: Inputs,
    known: Sequence[str] | None = None,
    workers: Workers = ALONE,
    penalized: bool = True,
) -> MultiTaskModel:
    """A model of the user's own, in training mode; initial values depend on torch's seed alone.

    Args:
        make: the user's function.
        config: `representation` and `batch_norm`.
        tasks: one head each; the head of a task that is not trained is left out.
        inputs: of two samples, on the CPU.
        known: all tasks of the data, by name; None: any head may be left out.
        workers, penalized: as for `build_model`.

    Raises:
        ValueError: what is wrong with the model, where, and what to do.
    """
    model, axis = _assembled(make, tasks, known)
    _check_parameters(model)
    dtype = next(model.encoder.parameters()).dtype
    name, rows = config.representation, _in_dtype(inputs, dtype)
    if penalized:
        allow_second_derivatives(model.encoder)
        for head in model.heads.values():
            allow_second_derivatives(head)
    model.representation = name
    try:
        model.representation_shape = output_shape(model, name, rows)
    except Exception as error:  # whatever the user's code raises
        if is_message(error):
            raise
        raise ValueError(
            f"model: the encoder does not run on {_described(rows)}: {failure_of(error)}."
        ) from error
    model.channel_axis = (
        axis if axis is not None else 2 if len(model.representation_shape) == 2 else 1
    )
    if model.channel_axis > len(model.representation_shape):
        raise ValueError(
            f"Model.channel_axis is {axis}, but the representation of a batch has the shape "
            f"[B, {', '.join(map(str, model.representation_shape))}]."
        )
    _check_predictions(model, tasks, rows)
    if penalized:
        check_second_derivative(model, name, rows)
    use_global_statistics(model, workers if config.batch_norm == "global" else ALONE)
    return model


def stored_own_model(make: ModelFunction, tasks: Sequence[HasHead]) -> MultiTaskModel:
    """The model that stored weights are for, without a look at data; its own weights mean nothing.

    Args:
        make: the user's function.
        tasks: one head each.

    Raises:
        ValueError: no model, or no head for a task.
    """
    model, _ = _assembled(make, tasks)
    return model


def _assembled(
    make: ModelFunction, tasks: Sequence[HasHead], known: Sequence[str] | None = None
) -> tuple[MultiTaskModel, int | None]:
    """What the function made, and the channel axis that it says."""
    try:
        made = make()
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f"model: the function that makes it failed: {failure_of(error)}."
        ) from error
    check(isinstance(made, Model), "model()", made, "a repmtl_ray.Model")
    missing = [task.name for task in tasks if task.name not in made.heads]
    if missing:
        raise ValueError(
            f"model: there is no head for task {missing[0]!r}; there are "
            f"{', '.join(made.heads) or 'none'}. Give Model.heads one for each task."
        )
    without = [name for name in made.heads if known is not None and name not in known]
    if without:
        raise ValueError(
            f"model: there is a head for {without[0]!r}, which is no task of the data; they have "
            f"{', '.join(known or ())}. Name the head as its task, or leave it out."
        )
    heads = {task.name: made.heads[task.name] for task in tasks}
    model = MultiTaskModel(made.encoder, heads, tasks)
    model.is_own = True
    return model, made.channel_axis


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if isinstance(inputs, Mapping):
        return {name: cast(tensor) for name, tensor in inputs.items()}
    return cast(inputs)


def _described(inputs: Inputs) -> str:
    if not isinstance(inputs, Mapping):
        return f"an input of shape {tuple(inputs.shape)} and dtype {inputs.dtype}"
    shapes = (f"{name}={tuple(t.shape)} {t.dtype}" for name, t in inputs.items())
    return f"the inputs {', '.join(shapes)}"


def _check_parameters(model: MultiTaskModel) -> None:
    """Refuses parameters that belong to two parts, or whose gradients no policy can combine."""
    owner: dict[int, str] = {}
    parts = {"the encoder": model.encoder}
    parts |= {f"the head of {task!r}": head for task, head in model.heads.items()}
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            other = owner.setdefault(id(parameter), part)
            if other != part:
                raise ValueError(
                    f"model: {other} and {part} share the parameter {name!r}. What several tasks "
                    "share belongs to the encoder: move the shared layers into it, and let "
                    "ModelConfig.representation name the module before them if they are not to be "
                    "part of the representation."
                )
        for name, layer in module.named_modules():
            if getattr(layer, "sparse", False) is True:
                raise ValueError(
                    f"model: {part} has the sparse embedding {name!r}, whose gradients cannot be "
                    "combined with others; make it with sparse=False."
                )
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise ValueError(
            "model: no parameter of the encoder requires grad, so the tasks share nothing that is "
            "trained. Unfreeze a part of it, for example its last block."
        )


def _check_predictions(model: MultiTaskModel, tasks: Sequence[HasHead], inputs: Inputs) -> None:
    """Runs encoder and heads once, in eval mode, and looks at every prediction."""
    features: list[Tensor] = []
    module = representation_module(model, model.representation)
    handle = module.register_forward_hook(lambda _m, _i, output: features.append(output))
    modes = [(part, part.training) for part in model.modules()]
    try:
        with torch.enable_grad():
            predictions = model.eval()(inputs)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"model: a head does not run on the encoder's output: {failure_of(error)}."
        ) from error
    finally:
        handle.remove()
        for part, mode in modes:
            part.training = mode
    if not features[0].requires_grad:
        raise ValueError(
            f"model: the representation (the output of {model.representation!r}) is detached from "
            "the encoder's parameters; remove detach() and torch.no_grad() from its forward()."
        )
    num_rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    for task in tasks:
        prediction = predictions[task.name]
        positions = ", H, W" if task.dense else ""
        is_tensor = isinstance(prediction, Tensor)
        shape = tuple(prediction.shape) if is_tensor else ()
        if shape[:2] != (num_rows, task.num_outputs) or len(shape) != (4 if task.dense else 2):
            found = f"a tensor of shape {shape}" if is_tensor else f"a {type(prediction).__name__}"
            raise ValueError(
                f"model: the head of {task.name!r} gives {found} for {num_rows} samples; expected "
                f"[{num_rows}, {task.num_outputs}{positions}]."
            )
        if not prediction.requires_grad:
            raise ValueError(
                f"model: the prediction of {task.name!r} has no graph; remove detach() and "
                "torch.no_grad() from its head."
            )
