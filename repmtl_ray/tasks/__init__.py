"""The tasks: what a head predicts, its loss over valid labels and its metrics.

`base` says what every task is. A class of one's own is derived from `Task`.
"""

from __future__ import annotations

from repmtl_ray.tasks.base import Task
from repmtl_ray.tasks.labels import Classification, Segmentation
from repmtl_ray.tasks.pixels import Depth, InverseDepth, Normals
from repmtl_ray.tasks.vectors import Binary, MultiLabel, Regression

__all__ = [
    "TASK_CLASSES",
    "Binary",
    "Classification",
    "Depth",
    "InverseDepth",
    "MultiLabel",
    "Normals",
    "Regression",
    "Segmentation",
    "Task",
]

TASK_CLASSES: tuple[type[Task], ...] = (
    Segmentation,
    Classification,
    Depth,
    InverseDepth,
    Normals,
    Regression,
    Binary,
    MultiLabel,
)
"""The tasks of this project; a stored model names them."""
