"""Scalable experiments in multi-task optimisation: Rep-MTL and its rivals on Ray.

Exact across workers and restarts. Every name is loaded when it is first used: the mathematics needs
no Ray, and processes that only read samples need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repmtl_ray.cluster import Placement
    from repmtl_ray.config import Experiment
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.delta import delta_p
    from repmtl_ray.regularizers import RepMTL, csa_loss, tsr_loss
    from repmtl_ray.runs.keeper import Checkpoints
    from repmtl_ray.saliency import task_saliency
    from repmtl_ray.search import SearchResult, tune
    from repmtl_ray.train import FitResult, fit

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "CustomData",
    "Experiment",
    "FitResult",
    "Placement",
    "RepMTL",
    "SearchResult",
    "csa_loss",
    "delta_p",
    "fit",
    "task_saliency",
    "tsr_loss",
    "tune",
]

_MODULES = {
    "Checkpoints": "runs.keeper",
    "CustomData": "data.custom",
    "Experiment": "config",
    "FitResult": "train",
    "Placement": "cluster",
    "RepMTL": "regularizers",
    "SearchResult": "search",
    "csa_loss": "regularizers",
    "delta_p": "delta",
    "fit": "train",
    "task_saliency": "saliency",
    "tsr_loss": "regularizers",
    "tune": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'repmtl_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"repmtl_ray.{_MODULES[name]}"), name)
