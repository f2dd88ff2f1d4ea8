"""What one optimisation step is made with: the optimiser, and how a device computes.

Owns `OptimizerConfig` and `ComputeConfig`, two parts of `config.Experiment`. Imports neither torch
nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from repmtl_ray.conversion import check, check_range, check_types

MAX_EPOCHS = 1_000_000
MAX_BATCH_SIZE = 1_000_000
MAX_FLOAT = 1e38
"""Greater numbers overflow in float32."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser of model parameters and its schedule.

    Args:
        name: "adam", "adamw" or "sgd".
        learning_rate, weight_decay, momentum: as in torch.optim (momentum: sgd only).
        halve_at_epoch: the learning rate halves once this many epochs are done; None keeps it.
        max_gradient_norm: clip the total gradient norm; None does not.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    momentum: float = 0.9
    halve_at_epoch: int | None = None
    max_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "optimizer")
        check_range("optimizer.learning_rate", self.learning_rate, 0, MAX_FLOAT, above=True)
        check_range("optimizer.weight_decay", self.weight_decay, 0, MAX_FLOAT)
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)")
        check(
            self.name == "sgd" or self.momentum == 0.9,
            "optimizer.momentum",
            self.momentum,
            f"no value with optimizer {self.name!r}, which does not use it",
        )
        check_range("optimizer.halve_at_epoch", self.halve_at_epoch, 1, MAX_EPOCHS)
        check_range("optimizer.max_gradient_norm", self.max_gradient_norm, 0, MAX_FLOAT, above=True)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a device computes a step: faster or in less memory, with results equal to rounding.

    The defaults compute as written. All options go together, and with every policy, penalty and
    precision.

    Args:
        compile: `torch.compile` of the encoder in training. Heads stay as they are, because Rep-MTL
            differentiates them twice. Needs a C++ compiler, and Triton on CUDA. Dropout inside the
            encoder draws other numbers.
        channels_last: keep maps and kernels with the channels as the last axis in memory.
        checkpointing: do not keep the encoder's activations; its backward pass computes them again,
            stage by stage, with the same dropout. Batch statistics count once.
        encoder_parts: the encoder sees the batch in so many equal parts, one after the other, and
            keeps the activations of none; its backward pass computes them again. It is
            gradient accumulation over the encoder: losses, heads, penalties and policies see the
            whole batch. Batch normalisation and dropout of the encoder see the parts, so with these
            the results are those of smaller batches there.
        fused: the optimiser's update in one kernel.
    """

    compile: bool = False
    channels_last: bool = False
    checkpointing: bool = False
    encoder_parts: int = 1
    fused: bool = False

    def __post_init__(self) -> None:
        check_types(self, "compute")
        check_range("compute.encoder_parts", self.encoder_parts, 1, MAX_BATCH_SIZE)

    def check_fits(self, batch_size: int, representation: str) -> None:
        """Refuses what the rest of an experiment does not allow.

        Args:
            batch_size, representation: as in `Experiment` and its `ModelConfig`.

        Raises:
            ValueError: parts that do not divide the batch, or an encoder that would be
                differentiated twice.
        """
        if batch_size % self.encoder_parts:
            raise ValueError(
                f"batch_size is {batch_size} with compute.encoder_parts {self.encoder_parts}: the parts must be equal. "
                "Take a number that divides the batch."
            )
        on_encoder = ("compile", "checkpointing", "encoder_parts")
        used = [name for name in on_encoder if getattr(self, name) != getattr(ComputeConfig, name)]
        if used and representation != "encoder":
            raise ValueError(
                f"compute.{used[0]} is {getattr(self, used[0])} with model.representation {representation!r}: the graph is "
                "split inside the encoder, which must then be computed as written. Leave it out, or take the representation at "
                "the 'encoder'."
            )
