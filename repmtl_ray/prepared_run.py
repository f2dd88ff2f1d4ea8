"""A run before it starts: its settings checked once, its data opened once, its samples read once.

Owns the order in which faults are found: settings before Ray and data, the data's listings before
their content, all of them before training. Where a run is kept is for `run_folder`, training for
`train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from repmtl_ray import cluster
from repmtl_ray.config import Experiment
from repmtl_ray.conversion import shown
from repmtl_ray.placement import Placement
from repmtl_ray.run_folder import OwnData
from repmtl_ray.runs.worker import CachedData

if TYPE_CHECKING:
    from repmtl_ray.data.cache import CheckedSplit
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.data.stream import Stream
    from repmtl_ray.tasks import Task

Split = Literal["train", "val", "test", "holdout"]
FinalSplit = Literal["val", "test"]


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run whose settings are right and whose data are open.

    Args:
        experiment: what is trained.
        placement: its workers.
        tasks: all of the data set, in its order.
        image_size: (height, width).
        streams: of every split that the run reads, by its name; empty for data of the user's own.
        splits: the names of the training, the evaluation and, if there is one, the final split.
        own_samples: of the user's own data, which can only be read whole.
    """

    experiment: Experiment
    placement: Placement
    tasks: tuple[Task, ...]
    image_size: tuple[int, int]
    streams: Mapping[str, tuple[Stream, ...]] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    own_samples: CachedData | None = None

    @property
    def own_data(self) -> OwnData | None:
        """What the folder of a run on data of the user's own notes of them."""
        samples = self.own_samples
        if samples is None:
            return None
        return OwnData(description=samples.description, fingerprint=samples.fingerprint)


def expect(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Refuses an argument of another type.

    Raises:
        ValueError: names the argument, its value and the type.
    """
    if not (isinstance(value, kind) or (optional and value is None)):
        also = " or None" if optional else ""
        raise ValueError(
            f"{name} is {shown(value)}; expected a value of type {kind.__name__}{also}."
        )


def check_settings(
    experiment: Experiment, placement: Placement, data: CustomData | None = None
) -> None:
    """Finds what is wrong with a run without starting Ray and without looking at data.

    Args:
        experiment, placement, data: as for `fit`.

    Raises:
        ValueError: values of other types, an experiment and data that do not go together, tasks,
            policy or penalties that cannot be trained, a batch that the workers cannot share, an
            encoder or weights that do not exist.
    """
    from repmtl_ray.models.encoders import check_available
    from repmtl_ray.runs import loop

    expect("experiment", experiment, Experiment)
    expect("placement", placement, Placement)
    if data is not None:
        _check_own(experiment, data)
    placement.check_divides(experiment.batch_size)
    loop.selected_tasks(experiment, None if data is None else data.tasks)
    check_available(experiment.model)


def _check_own(experiment: Experiment, data: object) -> None:
    from repmtl_ray.data import custom

    expect("data", data, custom.CustomData, optional=True)
    if experiment.data.name != custom.NAME:
        raise ValueError(
            f"data.name is {experiment.data.name!r}, but fit has data of your own; use "
            f"DataConfig(name={custom.NAME!r})."
        )


def prepare_run(
    experiment: Experiment,
    *,
    placement: Placement | None = None,
    data: CustomData | None = None,
    final_split: FinalSplit | None = None,
) -> PreparedRun:
    """Checks everything that can be checked before samples are read, and joins Ray.

    Args:
        experiment, placement, data: as for `fit`.
        final_split: read once, after training (`protocols.final_split`).

    Returns:
        The run with its data open. Rows of the user's own are read already.

    Raises:
        ValueError: where, what was found, what to do.
    """
    from repmtl_ray.models import build_model
    from repmtl_ray.runs import loop

    placement = placement or Placement()
    check_settings(experiment, placement, data)
    if data is None:
        prepared = open_data(experiment, placement, final_split)
        loop.num_steps(experiment, prepared.streams["train"])
    else:  # only Ray can read the rows
        cluster.connect()
        placement.check_fits()
        samples = _read_own(data)
        loop.num_steps(experiment, samples.train.streams)
        _check_labels(experiment, samples, ("train", "evaluation"))
        prepared = PreparedRun(
            experiment=experiment,
            placement=placement,
            tasks=samples.tasks,
            image_size=samples.image_size,
            own_samples=samples,
        )
    build_model(
        experiment.model,
        loop.selected_tasks(experiment, prepared.tasks),
        image_size=prepared.image_size,
        penalized=experiment.regularizer.active,
    )
    cluster.connect()
    placement.check_fits()
    return prepared


def open_data(
    experiment: Experiment, placement: Placement, final_split: FinalSplit | None = None
) -> PreparedRun:
    """Opens the splits of a named data set: listings and headers are checked, content is not.

    Args:
        experiment, placement, final_split: as for `prepare_run`.

    Raises:
        ValueError: data that are missing or not as they should be.
    """
    from repmtl_ray.data.sources import image_size, open_streams, tasks_of
    from repmtl_ray.data.stream import check_one_size

    splits: tuple[Split, ...] = (
        "train",
        experiment.data.eval_split,
        *([final_split] if final_split else []),
    )
    streams: dict[str, tuple[Stream, ...]] = {
        split: open_streams(experiment.data, split) for split in splits
    }
    check_one_size(streams)
    return PreparedRun(
        experiment=experiment,
        placement=placement,
        tasks=tasks_of(experiment.data),
        image_size=image_size(experiment.data),
        streams=streams,
        splits=splits,
    )


def read_samples(prepared: PreparedRun) -> CachedData:
    """Reads every sample of a run once, in parallel; all faults of the data show here.

    Raises:
        ValueError: samples that are not as they should be, a task without any label in a split.
    """
    from repmtl_ray.data.cache import CachedSplit, check_and_cache

    if prepared.own_samples is not None:
        return prepared.own_samples
    checked: list[CheckedSplit] = []
    for split in prepared.splits:
        used_bytes = sum(part.num_bytes for part in checked if isinstance(part, CachedSplit))
        checked.append(check_and_cache(prepared.streams[split], used_bytes=used_bytes))
    samples = CachedData(
        train=checked[0],
        evaluation=checked[1],
        final=checked[2] if len(checked) > 2 else None,
        tasks=prepared.tasks,
        image_size=prepared.image_size,
    )
    _check_labels(prepared.experiment, samples, prepared.splits)
    for note in samples.notes:
        print(f"note: {note}", flush=True)
    return samples


def _read_own(data: CustomData) -> CachedData:
    from repmtl_ray.data.custom import cache_custom

    train, evaluation, size = cache_custom(data)
    return CachedData(
        train=train, evaluation=evaluation, tasks=data.tasks, image_size=size, is_own=True
    )


def _check_labels(experiment: Experiment, samples: CachedData, splits: Sequence[str]) -> None:
    from repmtl_ray.data.cache import check_labels
    from repmtl_ray.runs import loop

    names = [task.name for task in loop.selected_tasks(experiment, samples.tasks)]
    checked = (samples.train, samples.evaluation, samples.final)
    roles = ("training", "evaluation", "final evaluation")
    for role, split, part in zip(roles, splits, checked, strict=False):
        if part is not None:
            check_labels(f"{role} split {split!r}", part, names)
