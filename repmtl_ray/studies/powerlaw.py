"""Power-law exponents of a model's layers, by part: the encoder, and every head (figures 3 to 6).

Owns which layers belong to which part and their means; the fit of a layer's spectrum is the library
weightwatcher's (`pip install "repmtl_ray[analysis]"`). No Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from repmtl_ray.runs.checkpoint import read_model

WELL_TRAINED = (2.0, 4.0)
"""Exponents that the paper calls well trained."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix.

    Args:
        name: in its part, "layer1.0.conv1".
        exponent: of the tail of its eigenvalue density, rho(x) ~ x^-exponent; a convolution is one
            matrix [channels out, channels in] per kernel position, all of whose eigenvalues are
            taken together.
        num_eigenvalues: in the fit's spectrum.
        distance: Kolmogorov-Smirnov distance of the fit; above 0.1 there is hardly a power law.
    """

    name: str
    exponent: float
    num_eigenvalues: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """The encoder or a head.

    Args:
        name: "encoder", or a task's.
        layers: whose spectrum could be fitted; small ones have too few eigenvalues.
        num_small: matrices left out.
    """

    name: str
    layers: tuple[Layer, ...]
    num_small: int

    @property
    def exponent(self) -> float | None:
        """The mean over its layers; None if none could be fitted."""
        return fmean(layer.exponent for layer in self.layers) if self.layers else None


def exponents(name: str, module: nn.Module) -> Part:
    """The exponents of all matrices in a module.

    Args:
        name: of the part.
        module: any; linear and convolutional layers count.

    Raises:
        ValueError: weightwatcher is not installed.

    Source:
        Martin and Mahoney, arXiv:1810.01075, by weightwatcher with its defaults; the mean over
        layers is Rep-MTL's figures 3 to 6 (arXiv:2507.21049), which do not say how layers are
        averaged.
    """
    watcher = _watcher(_with_parent(module.float()))
    with contextlib.redirect_stdout(io.StringIO()):  # a line for every layer of few eigenvalues
        table = watcher.analyze(plot=False)
    matrices = [
        child
        for child in module.modules()
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    layers = []
    if table is not None and "alpha" in table:
        for _, row in table.iterrows():
            if math.isfinite(row["alpha"]) and row["alpha"] > 0:
                layers.append(
                    Layer(
                        name=str(row["longname"]).removeprefix("part").removeprefix(".") or name,
                        exponent=float(row["alpha"]),
                        num_eigenvalues=int(row["num_evals"]),
                        distance=float(row["D"]),
                    )
                )
    return Part(name=name, layers=tuple(layers), num_small=len(matrices) - len(layers))


def of_checkpoint(directory: str | Path) -> list[Part]:
    """The encoder's exponents, and each head's, of a checkpoint's model.

    Raises:
        ValueError: no checkpoint of this project, or as `exponents`.
    """
    model = read_model(directory)
    parts = [("encoder", model.encoder), *model.heads.items()]
    return [exponents(name, module) for name, module in parts]


def text(parts: Sequence[Part]) -> str:
    """A table of the parts, aligned."""
    low, high = WELL_TRAINED
    lines = [f"{'part':<16}  exponent  layers  too small  well trained ({low:g} to {high:g})"]
    for part in parts:
        value = part.exponent
        shown = "n/a" if value is None else f"{value:.2f}"
        verdict = "" if value is None else "yes" if low <= value <= high else "no"
        lines.append(
            f"{part.name:<16}  {shown:>8}  {len(part.layers):>6}  {part.num_small:>9}  {verdict}"
        )
    return "\n".join(lines)


def _with_parent(module: nn.Module) -> nn.Module:
    """weightwatcher looks at a model's children, and would miss a part that is a single layer."""
    parent = nn.Module()
    parent.add_module("part", module)
    return parent


def _watcher(model: nn.Module) -> Any:
    root = logging.getLogger()
    level = root.level
    try:
        import weightwatcher
    except ImportError as error:
        raise ValueError(
            "power-law exponents need the library weightwatcher, which is not installed; "
            'pip install "repmtl_ray[analysis]".'
        ) from error
    finally:
        root.setLevel(level)  # which weightwatcher changes
    return weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)
