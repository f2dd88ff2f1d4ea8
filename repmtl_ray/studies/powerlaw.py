"""Power-law exponents of the layers of a model's encoder and heads (figures 3 to 6).

Owns which layers belong to which part of the model, and the means over them. The library
weightwatcher fits the spectrum of a layer (`pip install "repmtl_ray[analysis]"`). No Ray.
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

from repmtl_ray import extras
from repmtl_ray.report.table import aligned
from repmtl_ray.runs.checkpoint import read_model

WELL_TRAINED = (2.0, 4.0)
"""Exponents that the paper calls well trained."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix.

    Args:
        name: within its part, for example "layer1.0.conv1".
        exponent: of the tail of its eigenvalue density, rho(x) ~ x^-exponent; a convolution is one
            matrix [channels out, channels in] per kernel position, all of whose eigenvalues are
            taken together.
        num_eigenvalues: in the fit's spectrum.
        distance: Kolmogorov-Smirnov distance of the fit; above 0.1 a power law fits badly.
    """

    name: str
    exponent: float
    num_eigenvalues: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """The encoder or a head.

    Args:
        name: "encoder", or the name of the head's task.
        layers: whose spectrum was fitted.
        num_small: layers that were left out, because they have too few eigenvalues.
    """

    name: str
    layers: tuple[Layer, ...]
    num_small: int

    @property
    def exponent(self) -> float | None:
        """The mean over its layers; None if none could be fitted."""
        return fmean(layer.exponent for layer in self.layers) if self.layers else None


def fit_exponents(name: str, module: nn.Module) -> Part:
    """Fits the exponent of every linear and convolutional layer of a module.

    Args:
        name: of the part.
        module: whose layers are fitted.

    Raises:
        ValueError: weightwatcher is not installed.

    Source:
        Martin and Mahoney, arXiv:1810.01075, by weightwatcher with its defaults; the mean over
        layers is Rep-MTL's figures 3 to 6 (arXiv:2507.21049), which do not say how layers are
        averaged.
    """
    watcher = _watcher(_with_parent(module.float()))
    with contextlib.redirect_stdout(io.StringIO()):  # weightwatcher prints a line per small layer
        table = watcher.analyze(plot=False)
    num_matrices = sum(
        isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for child in module.modules()
    )
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
    return Part(name=name, layers=tuple(layers), num_small=num_matrices - len(layers))


def checkpoint_exponents(directory: str | Path) -> list[Part]:
    """The exponents of the encoder and of each head of a checkpoint's model.

    Raises:
        ValueError: the folder holds no checkpoint of this project, or weightwatcher is not installed.
    """
    model = read_model(directory)
    parts = [("encoder", model.encoder), *model.heads.items()]
    return [fit_exponents(name, module) for name, module in parts]


def exponents_table(parts: Sequence[Part]) -> str:
    """A table of the parts for the terminal."""
    low, high = WELL_TRAINED
    rows = []
    for part in parts:
        exponent = part.exponent
        shown = "n/a" if exponent is None else f"{exponent:.2f}"
        verdict = "" if exponent is None else "yes" if low <= exponent <= high else "no"
        rows.append([part.name, shown, str(len(part.layers)), str(part.num_small), verdict])
    headings = ["part", "exponent", "layers", "too small", f"well trained ({low:g} to {high:g})"]
    return aligned(headings, rows)


def _with_parent(module: nn.Module) -> nn.Module:
    """A model around the part: weightwatcher looks at children, and would miss a single layer."""
    parent = nn.Module()
    parent.add_module("part", module)
    return parent


def _watcher(model: nn.Module) -> Any:
    extras.require("the table of power-law exponents", "analysis")
    root = logging.getLogger()
    level = root.level
    try:
        import weightwatcher
    finally:
        root.setLevel(level)  # weightwatcher changes it when it is imported
    return weightwatcher.WeightWatcher(model=model, log_level=logging.ERROR)
