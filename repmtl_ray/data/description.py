"""What a result depends on in its data beside the samples: tasks, image size and normalisation.

Owns the description that is stored with a run, a checkpoint and an exported model, so that a model
can be built again where the data are not. The samples themselves are known by their fingerprint
(`cache`). A description is plain values: reading one runs no code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repmtl_ray import user_code
from repmtl_ray.conversion import added, check_types, differences, is_at_added_default

if TYPE_CHECKING:
    from repmtl_ray.data.stream import Normalization
    from repmtl_ray.tasks import Task

OWN_TASKS = "repmtl_ray.tasks"


@dataclass(frozen=True, kw_only=True)
class TaskDescription:
    """A task as plain values; a head can be built from it.

    Args:
        name: of the task and of its head.
        class_name: of its class, with its module unless it is one of this project's.
        kind: what its column holds (`stream.Kind`).
        dense: whether it predicts a map.
        num_outputs: the width of its head.
        settings: the other fields of its class.
        code: digest of the source of a class of the user's own, or of the functions that a task was
            given; "" for this project's.
    """

    name: str
    class_name: str
    kind: str
    dense: bool
    num_outputs: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    def __post_init__(self) -> None:
        check_types(self, "task")


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """What a model must know of its data.

    Args:
        tasks: that it predicts, in order.
        image_size: (height, width) of the images in pixels; None without images.
        mean, deviation: of the images' three channels, subtracted and divided by; None leaves images
            in 0..1.
        inputs: the columns that the encoder takes.
    """

    tasks: tuple[TaskDescription, ...]
    image_size: tuple[int, int] | None
    mean: tuple[float, float, float] | None = None
    deviation: tuple[float, float, float] | None = None
    inputs: tuple[str, ...] = added(("image",))

    def __post_init__(self) -> None:
        check_types(self, "data")

    @property
    def size_of_images(self) -> tuple[int, int]:
        """(height, width).

        Raises:
            ValueError: the model takes no images.
        """
        if self.image_size is None:
            raise ValueError(
                f"the model takes {', '.join(self.inputs)} and no images, which this is for; call "
                "the network of load_model(source, model=...) with tensors of these inputs by name."
            )
        return self.image_size

    @property
    def normalize(self) -> Normalization | None:
        """As `Stream.normalize`."""
        from repmtl_ray.data.stream import Normalization

        if self.mean is None or self.deviation is None:
            return None
        return Normalization(mean=self.mean, std=self.deviation)


def describe(
    tasks: Sequence[Task],
    image_size: tuple[int, int] | None,
    normalize: Normalization | None,
    inputs: tuple[str, ...] = ("image",),
) -> DataDescription:
    """The description of data.

    Args:
        tasks: those that are trained.
        image_size: (height, width); None without images.
        normalize, inputs: as in `Stream`; all streams of a data set have the same.
    """
    mean, deviation = (None, None) if normalize is None else (normalize.mean, normalize.std)
    return DataDescription(
        tasks=tuple(describe_task(task) for task in tasks),
        image_size=image_size,
        mean=mean,
        deviation=deviation,
        inputs=inputs,
    )


def describe_task(task: Task) -> TaskDescription:
    """A task as plain values.

    Raises:
        ValueError: a setting that no file can hold.
    """
    cls = type(task)
    is_own = cls.__module__.startswith(OWN_TASKS)
    code = [getattr(task, name) for name in task.code_fields]
    return TaskDescription(
        name=task.name,
        class_name=cls.__name__ if is_own else f"{cls.__module__}.{cls.__qualname__}",
        kind=task.kind,
        dense=task.dense,
        num_outputs=task.num_outputs,
        settings={
            entry.name: getattr(task, entry.name)
            for entry in dataclasses.fields(task)
            if entry.name not in ("name", *task.code_fields)
            and not is_at_added_default(task, entry)
        },
        code=user_code.identity(code) if code else "" if is_own else code_digest(cls),
    )


def tasks_of(data: DataDescription) -> tuple[Task, ...]:
    """The tasks that a description is of.

    Raises:
        ValueError: a task whose class is the user's own, which no file holds.
    """
    from repmtl_ray import tasks

    known = {cls.__name__: cls for cls in tasks.TASK_CLASSES}
    made: list[Task] = []
    for task in data.tasks:
        if task.class_name not in known:
            raise ValueError(
                f"task {task.name!r} is of the class {task.class_name}, whose code no file of a "
                "model holds; hand over the task itself."
            )
        made.append(known[task.class_name](name=task.name, **task.settings))
    return tuple(made)


def code_digest(cls: type) -> str:
    """Twelve hexadecimal digits of the source of a class and of its parents outside this project.

    Of a class without source (typed at a prompt) the compiled methods are taken.
    """
    digest = hashlib.sha256()
    for part in cls.__mro__:
        if part.__module__.partition(".")[0] in ("builtins", "abc", "repmtl_ray", "typing"):
            continue
        try:
            digest.update(inspect.getsource(part).encode())
        except (OSError, TypeError):
            for name, value in sorted(vars(part).items()):
                function = getattr(value, "fget", getattr(value, "__func__", value))
                if isinstance(function, types.FunctionType):
                    code = function.__code__
                    constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
                    digest.update(f"{name} {code.co_names} {constants}".encode() + code.co_code)
    return digest.hexdigest()[:12]


def data_differences(old: DataDescription, new: DataDescription) -> str:
    """What differs in two descriptions, as "path was x, is y"; empty if nothing does."""
    before, after = ({task.name: task for task in data.tasks} for data in (old, new))
    if list(before) != list(after):
        return f"tasks were {', '.join(before)}, are {', '.join(after)}"
    parts = [differences(before[name], after[name]) for name in before]
    problems = [f"task {name}: {part}" for name, part in zip(before, parts, strict=True) if part]
    rest = differences(dataclasses.replace(old, tasks=()), dataclasses.replace(new, tasks=()))
    return ", ".join([*problems, *([rest] if rest else [])])
