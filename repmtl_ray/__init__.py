"""Scalable experiments in multi-task optimisation: Rep-MTL and its rivals on Ray, exact across workers and restarts.

The mathematics works without Ray; the names that need it are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repmtl_ray.delta import delta_p
from repmtl_ray.regularizers import RepMTL, csa_loss, tsr_loss
from repmtl_ray.saliency import task_saliency

if TYPE_CHECKING:
    from repmtl_ray.config import Experiment
    from repmtl_ray.search import SearchResult, tune
    from repmtl_ray.train import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Experiment",
    "FitResult",
    "RepMTL",
    "SearchResult",
    "csa_loss",
    "delta_p",
    "fit",
    "task_saliency",
    "tsr_loss",
    "tune",
]

_ON_FIRST_USE = {
    "Experiment": "repmtl_ray.config",
    "FitResult": "repmtl_ray.train",
    "fit": "repmtl_ray.train",
    "SearchResult": "repmtl_ray.search",
    "tune": "repmtl_ray.search",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module 'repmtl_ray' has no attribute {name!r}")
