"""From a data configuration to streams, tasks and image size.

Owns the choice of the source and of its form; reading is in the modules that it names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repmtl_ray import storage
from repmtl_ray.config import DataConfig
from repmtl_ray.conversion import nearest, shown
from repmtl_ray.data import (
    cityscapes,
    dense,
    image_table,
    manifest,
    npy,
    nyuv2,
    office,
    parquet_files,
    rendered,
    shards,
)
from repmtl_ray.data.description import DataDescription, describe
from repmtl_ray.data.stream import Kind, Normalization, Sample, Stream, hold_out
from repmtl_ray.scenes.rooms import ROOMS
from repmtl_ray.scenes.scene_cache import Series
from repmtl_ray.scenes.streets import STREETS

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

__all__ = [
    "Kind",
    "Normalization",
    "Sample",
    "Stream",
    "form_of",
    "image_size",
    "open_streams",
    "tasks_of",
]

Split = Literal["train", "val", "test"]

_OFFICIAL = {"cityscapes": cityscapes, "nyuv2": nyuv2}
_RENDERERS = {"cityscapes": STREETS, "nyuv2": ROOMS}
_DENSE = {
    "cityscapes": (cityscapes.CITYSCAPES, cityscapes.FOLDERS),
    "nyuv2": (nyuv2.NYUV2, nyuv2.FOLDERS),
}


def open_streams(
    data: DataConfig, split: Split | Literal["holdout"], *, every_header: bool = True
) -> tuple[Stream, ...]:
    """The streams of one split, after every check that listings and file headers allow.

    Scenes are rendered on first use, which takes minutes at the full size. What is in a file is
    checked when a sample is loaded.

    Args:
        data, split: which samples.
        every_header: without it, npy files that cannot be used are found when they are loaded.

    Raises:
        ValueError: data that is missing or not as it should be: which file, what was found, what to
            do.
    """
    _check_named(data)
    if data.holdout > 0 and split in ("train", "holdout"):
        whole = open_streams(dataclasses.replace(data, holdout=0.0, eval_split="val"), "train")
        return hold_out(whole, split == "holdout", fraction=data.holdout, seed=data.holdout_seed)
    if split == "holdout":
        raise ValueError("data.holdout is 0: there is no split 'holdout'; give it a fraction.")
    size = None if data.height is None or data.width is None else (data.height, data.width)
    if _in_shards(data):
        which_streams = None if data.name in _DENSE else data.domains
        return shards.open_split(
            str(data.path), split, name=data.name, streams=which_streams, size=size
        )
    if data.name == image_table.NAME:
        return (image_table.open_split(_folder(data), split, size=size),)
    if data.name not in _DENSE:
        root, domains = _folder(data), _domains(data)
        which_set = office.set_of(data.name, root, domains)
        return office.open_split(which_set, root, split, domains=domains, size=size)
    which, _ = _DENSE[data.name]
    if data.path is None:
        return (_rendered(data, size or which.size, split),)
    form = form_of(data)
    if form == "official":
        official = _OFFICIAL[data.name].open_frames(_folder(data), split)
        return (dense.open_stream(which, official, size=size or which.size),)
    if form == "parquet":
        rows = parquet_files.open_frames(which, _folder(data), split, data.columns)
        return (dense.open_stream(which, rows, size=size),)
    return (_open_npy(data.name, _folder(data), split, size, every_header=every_header),)


def check_folder(data: DataConfig) -> None:
    """Whether the folder of a data set exists; before checks that take longer.

    Raises:
        ValueError: it does not; as from `open_streams`, which says what is expected there.
    """
    if data.path is not None and storage.is_local(data.path) and not _folder(data).exists():
        open_streams(data, "train")


def tasks_of(data: DataConfig) -> tuple[Task, ...]:
    """All tasks of a data set, in its order, with their options; looks at no file, except at the
    lists of image_folders and at the table of image_table, which say what there is to learn.

    Raises:
        ValueError: folders, lists or a table that are missing or cannot be read; options of a task
            that there is not, or that it does not take.
    """
    tasks = _usual_tasks(data)
    names = [task.name for task in tasks]
    for name in data.task_options:
        if name not in names:
            raise ValueError(
                f"data.task_options has {name!r}, which is not a task of {data.name}; "
                f"{nearest(name, names)}"
            )
    return tuple(_with_options(task, data.task_options.get(task.name, {})) for task in tasks)


def _with_options(task: Task, options: Mapping[str, Any]) -> Task:
    """The task with some fields changed; those without a default belong to the data."""
    allowed = {
        entry.name
        for entry in dataclasses.fields(task)
        if entry.default is not dataclasses.MISSING and entry.name != "num_values"
    }
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(
                f"data.task_options.{task.name}.{name} is {shown(value)}, but {type(task).__name__} "
                f"takes no option {name!r}; {nearest(name, allowed) if allowed else 'it has none.'}"
            )
    return dataclasses.replace(task, **options)


def _usual_tasks(data: DataConfig) -> tuple[Task, ...]:
    # Here, so that the processes that only read samples need not load torch.
    from repmtl_ray.tasks import Classification, Depth, InverseDepth, Normals, Segmentation

    _check_named(data)
    if data.name == image_table.NAME:
        return image_table.tasks_in(_folder(data))
    if data.name not in _DENSE:
        number = _num_classes(data)
        return tuple(Classification(name=domain, num_classes=number) for domain in _domains(data))
    which, _ = _DENSE[data.name]
    of_kind = {"depth": Depth, "inverse_depth": InverseDepth, "normal": Normals}
    return tuple(
        Segmentation(name=name, num_classes=which.num_classes)
        if kind == "label"
        else of_kind[kind](name=name)
        for name, kind in which.targets.items()
    )


def describe_config(data: DataConfig, tasks: Sequence[str] | None) -> DataDescription:
    """What a model must know of a named data set, by its configuration.

    Args:
        data: of a run.
        tasks: names of those that it trains; None means all.

    Raises:
        ValueError: as `image_size`; data of the user's own, which no configuration describes.
    """
    trained = [task for task in tasks_of(data) if tasks is None or task.name in tasks]
    normalize = None if data.name in _DENSE else office.IMAGENET
    return describe(trained, image_size(data), normalize)


def image_size(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the images that a model will see.

    Raises:
        ValueError: the stored size is asked for, and the folder does not tell it.
    """
    _check_named(data)
    if data.height is not None and data.width is not None:
        return data.height, data.width
    if _in_shards(data):
        return shards.stored_size(str(data.path))
    if data.name not in _DENSE:
        return office.SIZE
    which, folders = _DENSE[data.name]
    if data.path is None or form_of(data) == "official":
        return which.size
    if form_of(data) == "parquet":
        rows = parquet_files.open_frames(which, _folder(data), "train", data.columns)
        return dense.image_size(which, rows)
    return dense.image_size(which, npy.first_frame(which, folders, _folder(data)))


def form_of(data: DataConfig) -> str:
    """In which form the data at the path is; looks, if the configuration says "auto".

    Raises:
        ValueError: it could be several.
    """
    if data.form != "auto":
        return data.form
    if _in_shards(data):
        return "shards"
    if data.name not in _DENSE:
        return "table" if data.name == image_table.NAME else "folders"
    root = _folder(data)
    is_there_by_form = {
        "npy": npy.is_layout(_DENSE[data.name][1], root),
        "official": _OFFICIAL[data.name].is_official(root),
        "parquet": parquet_files.is_mirror(root),
    }
    forms = [form for form, is_there in is_there_by_form.items() if is_there]
    if len(forms) > 1:
        raise ValueError(
            f"{data.name}: {root} holds the data in the forms {' and '.join(forms)}; choose one "
            "with data.form."
        )
    return forms[0] if forms else "npy"  # whose errors say what is missing


def _num_classes(data: DataConfig) -> int:
    """Of every domain."""
    if data.name not in office.SETS and _in_shards(data):
        splits = manifest.read(str(data.path)).splits.values()
        counted = [
            names for streams in splits for s in streams.values() for names in s.classes.values()
        ]
        return 1 + max(int(name) for names in counted for name in names)
    root, domains = _folder(data), _domains(data)
    return office.num_classes(office.set_of(data.name, root, domains), root, domains)


def _check_named(data: DataConfig) -> None:
    if data.name == "custom":
        raise ValueError(
            "data.name is 'custom': its Ray Datasets are handed over with fit(experiment, data=CustomData(...))."
        )


def _in_shards(data: DataConfig) -> bool:
    return data.form == "shards" or (data.form == "auto" and shards.is_store(data.path))


def _rendered(data: DataConfig, size: tuple[int, int], split: str) -> Stream:
    assert data.num_train is not None, "DataConfig fills it in"
    assert data.num_val is not None, "DataConfig fills it in"
    which, folders = _DENSE[data.name]
    series = Series(
        renderer=_RENDERERS[data.name],
        num_train=data.num_train,
        num_val=data.num_val,
        height=size[0],
        width=size[1],
        seed=data.scene_seed,
    )
    return dense.open_stream(which, rendered.open_frames(which, folders, series, split))


def _open_npy(
    name: str, root: Path, split: str, size: tuple[int, int] | None, *, every_header: bool = True
) -> Stream:
    which, folders = _DENSE[name]
    frames = npy.open_frames(which, folders, root, split, every_header=every_header)
    return dense.open_stream(which, frames, size=size)


def _domains(data: DataConfig) -> tuple[str, ...]:
    assert data.domains is not None, "DataConfig fills them in"
    return data.domains


def _folder(data: DataConfig) -> Path:
    assert data.path is not None, "DataConfig requires a path for this data set"
    return Path(data.path).expanduser().resolve()
