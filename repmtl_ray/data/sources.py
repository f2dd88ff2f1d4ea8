"""From a data configuration to streams, tasks and image size.

Owns the choice of the source; reading is in `cityscapes`, `office` and `street_scenes`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repmtl_ray.config import DataConfig
from repmtl_ray.data import cityscapes, office, rendered, street_scenes
from repmtl_ray.data.stream import Kind, Normalization, Sample, Stream

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

__all__ = ["Kind", "Normalization", "Sample", "Stream", "image_size", "open_streams", "tasks_of"]

RENDERED_SIZE = (128, 256)


def open_streams(data: DataConfig, split: Literal["train", "val", "test"]) -> tuple[Stream, ...]:
    """The streams of one split, after every check that listings and file headers allow.

    Street scenes are rendered on first use, which takes minutes at the full size. What is in a file
    is checked when a sample is loaded.

    Raises:
        ValueError: data that is missing or not as it should be: which file, what was found, what to
            do.
    """
    size = None if data.height is None or data.width is None else (data.height, data.width)
    if data.name == "office31":
        return office.open_split(_folder(data), split, domains=data.domains, size=size)
    if data.path is not None:
        return (cityscapes.open_split(_folder(data), split, size=size),)
    height, width = size or RENDERED_SIZE
    root = street_scenes.cached(
        num_train=data.num_train,
        num_val=data.num_val,
        height=height,
        width=width,
        seed=data.scene_seed,
    )
    read = partial(cityscapes.open_split, split=split, size=None)
    seed = data.scene_seed
    return (rendered.on_any_node(root, split, read, seed=seed, height=height, width=width),)


def tasks_of(data: DataConfig) -> tuple[Task, ...]:
    """All tasks of a data set, in its order; looks at no file."""
    # Here, so that the processes that only read samples need not load torch.
    from repmtl_ray.tasks import Classification, InverseDepth, Segmentation

    if data.name == "office31":
        return tuple(
            Classification(name=domain, num_classes=office.NUM_CLASSES) for domain in data.domains
        )
    return (
        Segmentation(name=cityscapes.SEGMENTATION, num_classes=cityscapes.NUM_CLASSES),
        InverseDepth(name=cityscapes.DEPTH),
    )


def image_size(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the images that a model will see.

    Raises:
        ValueError: the stored size is asked for, and the folder does not tell it.
    """
    if data.height is not None and data.width is not None:
        return data.height, data.width
    if data.name == "office31":
        return office.SIZE
    return RENDERED_SIZE if data.path is None else cityscapes.stored_size(_folder(data))


def _folder(data: DataConfig) -> Path:
    assert data.path is not None, "DataConfig requires a path for this data set"
    return Path(data.path).expanduser().resolve()
