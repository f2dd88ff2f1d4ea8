"""The tasks: what a head predicts, its loss over valid labels and its metrics.

`base` says what every task is. A loss and metrics of one's own make a `CustomTask`; a class of one's
own is derived from `Task`.
"""

from __future__ import annotations

from repmtl_ray.tasks.base import Task
from repmtl_ray.tasks.custom import CustomTask
from repmtl_ray.tasks.labels import Classification, Segmentation
from repmtl_ray.tasks.pixels import Depth, InverseDepth, Normals
from repmtl_ray.tasks.vectors import Binary, MultiLabel, Regression

__all__ = [
    "TASK_CLASSES",
    "Binary",
    "Classification",
    "CustomTask",
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
"""The tasks of this project that a stored model names; the code of a `CustomTask` is in no file."""
