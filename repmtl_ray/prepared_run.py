"""A run before it starts: its settings checked once, its data opened once, its samples read once.

Owns the order in which faults are found: settings before Ray and data, the data's listings before
their content, all of them before training. Where a run is kept is for `run_folder`, training for
`train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from repmtl_ray import cluster, user_code
from repmtl_ray.config import OWN_MODEL, Experiment, ModelConfig, differences
from repmtl_ray.conversion import shown
from repmtl_ray.placement import Placement
from repmtl_ray.policy_names import OwnPolicy
from repmtl_ray.run_folder import OwnData
from repmtl_ray.runs.worker import CachedData

if TYPE_CHECKING:
    from repmtl_ray.data.cache import CheckedSplit
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.data.stream import Stream
    from repmtl_ray.models.own import ModelFunction
    from repmtl_ray.runs import build
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
        image_size: (height, width); None without images.
        streams: of every split that the run reads, by its name; empty for data of the user's own.
        splits: the names of the training, the evaluation and, if there is one, the final split.
        own_samples: of the user's own data, which can only be read whole.
        make_model: makes a model of the user's own.
    """

    experiment: Experiment
    placement: Placement
    tasks: tuple[Task, ...]
    image_size: tuple[int, int] | None
    streams: Mapping[str, tuple[Stream, ...]] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()
    own_samples: CachedData | None = None
    make_model: ModelFunction | None = None

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


def with_model(experiment: Experiment, model: ModelFunction | None) -> Experiment:
    """The experiment with a model of the user's own, known by the identity of its code.

    Args:
        experiment: its `model` says nothing but `representation` and `batch_norm`.
        model: the function that makes the model; None leaves the experiment as it is.

    Raises:
        ValueError: no function, or an experiment that asks for another model.
    """
    expect("experiment", experiment, Experiment)
    given = experiment.model
    if model is None:
        if given.encoder == OWN_MODEL:
            raise ValueError(
                f"model.encoder is {OWN_MODEL!r}, but no model was handed over; give the function "
                "that makes it: model=..."
            )
        return experiment
    if not callable(model) or isinstance(model, type):
        raise ValueError(
            f"model is {shown(model)}; expected a function without arguments that returns a "
            "repmtl_ray.Model: every worker calls it under the seed of the run."
        )
    own = ModelConfig(
        encoder=OWN_MODEL,
        representation=given.representation,
        batch_norm=given.batch_norm,
        code=user_code.identity(model),
    )
    usual = dataclasses.replace(
        ModelConfig(), representation=given.representation, batch_norm=given.batch_norm
    )
    if given not in (usual, dataclasses.replace(own, code=given.code)):
        raise ValueError(
            f"model is handed over, but the experiment asks for another: {differences(usual, given)}. "
            "Leave these settings out; of ModelConfig, a model of your own has `representation` "
            "and `batch_norm` alone."
        )
    return dataclasses.replace(experiment, model=own)


def check_settings(
    experiment: Experiment, placement: Placement, data: CustomData | None = None
) -> Placement:
    """Finds what is wrong with a run without starting Ray and without looking into data.

    Args:
        experiment, placement, data: as for `fit`.

    Returns:
        The placement; for rows that are streamed, one that leaves CPUs to Ray Data.

    Raises:
        ValueError: values of other types, an experiment and data that do not go together, tasks,
            policy or penalties that cannot be trained, a batch that the workers cannot share, a
            folder of data, an encoder or weights that do not exist.
    """
    from repmtl_ray.data.sources import check_folder
    from repmtl_ray.models.encoders import check_available
    from repmtl_ray.runs import loop

    expect("experiment", experiment, Experiment)
    expect("placement", placement, Placement)
    if data is not None:
        _check_own(experiment, data)
        placement = _for_rows(placement, data)
    else:
        check_folder(experiment.data)
    placement.check_divides(experiment.batch_size)
    loop.selected_tasks(experiment, None if data is None else data.tasks)
    check_available(experiment.model)
    return placement


def _for_rows(placement: Placement, data: CustomData) -> Placement:
    """Only tasks of Ray Data can read rows that are streamed."""
    if not data.is_streamed:
        return placement
    if placement.data == "worker":
        raise ValueError(
            "data is 'worker', but StreamedRows are read by tasks of Ray Data, on CPUs that no worker has "
            "reserved; take data='auto'."
        )
    return dataclasses.replace(placement, data="ray")


def _check_own(experiment: Experiment, data: object) -> None:
    from repmtl_ray.data import custom

    expect("data", data, custom.CustomData, optional=True)
    if experiment.data.name != custom.NAME:
        raise ValueError(
            f"data.name is {experiment.data.name!r}, but data of your own are handed over; use "
            f"DataConfig(name={custom.NAME!r})."
        )
    assert isinstance(data, custom.CustomData)
    if experiment.data.augment and "image" not in data.inputs:
        raise ValueError(
            f"data.augment is True, but only the column 'image' is augmented, and the inputs are "
            f"{', '.join(data.inputs)}; leave it out."
        )


def prepare_run(
    experiment: Experiment,
    *,
    placement: Placement | None = None,
    data: CustomData | None = None,
    model: ModelFunction | None = None,
    final_split: FinalSplit | None = None,
    names: Sequence[str] = (),
) -> PreparedRun:
    """Checks everything that can be checked before samples are read, and joins Ray.

    Args:
        experiment: as for `fit`; with a model of the user's own, as `with_model` returns it.
        placement, data, model: as for `fit`.
        names: of the policies that other runs of the same study have.
        final_split: read once, after training (`protocols.final_split`).

    Returns:
        The run with its data open. Rows of the user's own are read already.

    Raises:
        ValueError: where, what was found, what to do.
    """
    from repmtl_ray.runs import build, loop
    from repmtl_ray.runs.sample_check import check_samples

    placement = check_settings(experiment, placement or Placement(), data)
    _send_by_value(model, data, [experiment.policy.name, *names])
    if data is None:
        prepared = open_data(experiment, placement, final_split)
        loop.num_steps(experiment, prepared.streams["train"])
    else:  # only Ray can read the rows
        cluster.connect()
        placement.check_fits()
        samples = _read_own(data, model)
        loop.num_steps(experiment, samples.train.streams)
        _check_labels(experiment, samples, ("train", "evaluation"))
        prepared = PreparedRun(
            experiment=experiment,
            placement=placement,
            tasks=samples.tasks,
            image_size=samples.image_size,
            own_samples=samples,
        )
    prepared = dataclasses.replace(prepared, make_model=model)
    tasks = build.selected_tasks(experiment, prepared.tasks)
    model_now = build.initial_model(experiment, tasks, _training_split(prepared))
    if prepared.own_samples is not None and model is not None:
        check_samples(experiment, model_now, prepared.own_samples.train, "training")
        check_samples(experiment, model_now, prepared.own_samples.evaluation, "evaluation")
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
        make_model=prepared.make_model,
    )
    _check_labels(prepared.experiment, samples, prepared.splits)
    for note in samples.notes:
        print(f"note: {note}", flush=True)
    return samples


def _training_split(prepared: PreparedRun) -> build.Split:
    """The training samples as the loop takes them, for a look at the first ones."""
    from repmtl_ray.data.batches import LocalRows
    from repmtl_ray.runs import build
    from repmtl_ray.runs.worker import split_of

    if prepared.own_samples is not None:
        return split_of(prepared.own_samples, prepared.own_samples.train)
    streams = prepared.streams["train"]
    return build.Split(
        streams=streams,
        rows={stream.name: LocalRows(stream) for stream in streams},
        tasks=prepared.tasks,
        image_size=prepared.image_size,
        make_model=prepared.make_model,
    )


def _send_by_value(
    model: ModelFunction | None, data: CustomData | None, names: Sequence[str]
) -> None:
    """Makes the user's own code travel to the workers as a copy, not as the name of a module.

    A node of a cluster has no copy of the user's script and of the modules beside it.

    Raises:
        ValueError: code that cannot be copied.
    """
    from ray import cloudpickle

    parts: dict[str, Any] = {"model": model}
    if data is not None:
        parts |= {"CustomData.collate": data.collate, "CustomData.tasks": data.tasks}
    parts |= {f"policy {name}": name.policy for name in names if isinstance(name, OwnPolicy)}
    for name, part in parts.items():
        if part is None:
            continue
        for module in user_code.modules_of(part):
            cloudpickle.register_pickle_by_value(module)
        try:
            cloudpickle.dumps(part)
        except Exception as error:  # what the user's objects raise when they are copied
            raise ValueError(
                f"{name} cannot be sent to the workers ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). Create what cannot be copied (open files, "
                "locks, connections) inside the function, not outside of it."
            ) from error


def _read_own(data: CustomData, model: ModelFunction | None) -> CachedData:
    from repmtl_ray.data.custom import open_custom

    train, evaluation, size = open_custom(data)
    return CachedData(
        train=train,
        evaluation=evaluation,
        tasks=data.tasks,
        image_size=size,
        make_model=model,
        is_own=True,
        inputs_code="" if data.collate is None else user_code.identity(data.collate),
    )


def _check_labels(experiment: Experiment, samples: CachedData, splits: Sequence[str]) -> None:
    from repmtl_ray.data.cache import CachedSplit, check_labels
    from repmtl_ray.runs import loop
    from repmtl_ray.tasks.vectors import check_answers

    tasks = loop.selected_tasks(experiment, samples.tasks)
    names = [task.name for task in tasks]
    checked = (samples.train, samples.evaluation, samples.final)
    roles = ("training", "evaluation", "final evaluation")
    for role, split, part in zip(roles, splits, checked, strict=False):
        if part is not None:
            check_labels(f"{role} split {split!r}", part, names)
        if isinstance(part, CachedSplit) and role != "training":
            for task in tasks:
                if task.name in part.answers:
                    check_answers(task, part.answers[task.name])
