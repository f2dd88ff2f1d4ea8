"""Scalable experiments in multi-task optimisation: Rep-MTL and its rivals on Ray.

Exact across workers and restarts. Every name is loaded when it is first used: the mathematics needs
no Ray, and processes that only read samples need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repmtl_ray import extras

if TYPE_CHECKING:
    from repmtl_ray import policies, protocols, tasks
    from repmtl_ray.config import (
        ComputeConfig,
        DataConfig,
        Experiment,
        ModelConfig,
        NonFiniteLossError,
        OptimizerConfig,
        PolicyConfig,
        RegularizerConfig,
    )
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.data.streamed import StreamedRows
    from repmtl_ray.delta import delta_m, delta_p
    from repmtl_ray.inference import TrainedModel, evaluate, load_model, predict
    from repmtl_ray.models.own import Model
    from repmtl_ray.penalties import csa_loss, tsr_loss
    from repmtl_ray.placement import Placement
    from repmtl_ray.policies.combined_loss import combined_loss
    from repmtl_ray.regularizers import RepMTL
    from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
    from repmtl_ray.saliency import task_saliency
    from repmtl_ray.search import SearchResult, tune
    from repmtl_ray.studies.benchmark import benchmark
    from repmtl_ray.studies.recommend import recommend
    from repmtl_ray.tasks import (
        Classification,
        CustomTask,
        Depth,
        InverseDepth,
        Normals,
        Segmentation,
        Task,
    )
    from repmtl_ray.train import FitResult, fit

__version__ = "0.1.0"

_NAMES = {
    "config": (
        "ComputeConfig",
        "DataConfig",
        "Experiment",
        "ModelConfig",
        "NonFiniteLossError",
        "OptimizerConfig",
        "PolicyConfig",
        "RegularizerConfig",
    ),
    "data.custom": ("CustomData",),
    "data.streamed": ("StreamedRows",),
    "delta": (
        "delta_m",
        "delta_p",
    ),
    "inference": (
        "TrainedModel",
        "evaluate",
        "load_model",
        "predict",
    ),
    "models.own": ("Model",),
    "placement": ("Placement",),
    "policies.combined_loss": ("combined_loss",),
    "regularizers": ("RepMTL",),
    "penalties": (
        "csa_loss",
        "tsr_loss",
    ),
    "runs.checkpoint_manager": ("CheckpointConfig",),
    "saliency": ("task_saliency",),
    "search": (
        "SearchResult",
        "tune",
    ),
    "studies.benchmark": ("benchmark",),
    "studies.recommend": ("recommend",),
    "tasks": (
        "Classification",
        "CustomTask",
        "Depth",
        "InverseDepth",
        "Normals",
        "Segmentation",
        "Task",
    ),
    "train": (
        "FitResult",
        "fit",
    ),
}
"""By module, the names that the package offers."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_EXTRA_OF = {
    "data.custom": "ray",
    "data.streamed": "ray",
    "inference": "vision",
    "placement": "ray",
    "runs.checkpoint_manager": "vision",
    "search": "ray",
    "studies.benchmark": "ray",
    "studies.recommend": "vision",
    "train": "ray",
}
"""By module, the extra without which it cannot be imported."""
_SUBMODULES = ("policies", "protocols", "tasks")

__all__ = [
    "CheckpointConfig",
    "Classification",
    "ComputeConfig",
    "CustomData",
    "CustomTask",
    "DataConfig",
    "Depth",
    "Experiment",
    "FitResult",
    "InverseDepth",
    "Model",
    "ModelConfig",
    "NonFiniteLossError",
    "Normals",
    "OptimizerConfig",
    "Placement",
    "PolicyConfig",
    "RegularizerConfig",
    "RepMTL",
    "SearchResult",
    "Segmentation",
    "StreamedRows",
    "Task",
    "TrainedModel",
    "benchmark",
    "combined_loss",
    "csa_loss",
    "delta_m",
    "delta_p",
    "evaluate",
    "fit",
    "load_model",
    "policies",
    "predict",
    "protocols",
    "recommend",
    "task_saliency",
    "tasks",
    "tsr_loss",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"repmtl_ray.{name}")
    if name in _MODULE_OF:
        module = _MODULE_OF[name]
        if module in _EXTRA_OF:
            extras.require(f"repmtl_ray.{name}", _EXTRA_OF[module])
        return getattr(importlib.import_module(f"repmtl_ray.{module}"), name)
    raise AttributeError(
        f"module 'repmtl_ray' has no attribute {name!r}; it offers {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
