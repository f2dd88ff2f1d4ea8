"""What every worker of a Ray Train run gets and does: go on where the run stands, train, report.

Owns the loop's place inside Ray Train; the epochs are `loop.py`'s, how a run survives is
`fault_tolerance.py`'s. What only a worker needs is imported when it runs: Tune's driver and Train's
controller import this module too.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.collective

from repmtl_ray import cluster, collectives, node_check
from repmtl_ray.config import Experiment, ExperimentError, digest
from repmtl_ray.data.description import DataDescription, describe
from repmtl_ray.runs.callbacks import AddDeltaP, Callback, StepInfo
from repmtl_ray.runs.checkpoint_manager import read_marker
from repmtl_ray.runs.worker_loss import RunPosition

if TYPE_CHECKING:
    import torch

    from repmtl_ray.collectives import Workers
    from repmtl_ray.data.batches import Loader
    from repmtl_ray.data.cache import CheckedSplit
    from repmtl_ray.data.data_actor import RunBatches
    from repmtl_ray.data.streamed_loader import Reader
    from repmtl_ray.models.own import ModelFunction
    from repmtl_ray.placement import Placement
    from repmtl_ray.runs.build import Split
    from repmtl_ray.runs.checkpoint import Parts
    from repmtl_ray.runs.fault_tolerance import FaultTolerance
    from repmtl_ray.tasks import Task


@dataclass(frozen=True, kw_only=True)
class CachedData:
    """The samples of an experiment, read, checked and kept where all workers get them; small enough
    to hand around."""

    train: CheckedSplit
    evaluation: CheckedSplit
    final: CheckedSplit | None = None
    """The split that is read once, at the end, with the best epoch's weights (protocols.py)."""
    tasks: tuple[Task, ...]
    """All of the data set, in its order."""
    image_size: tuple[int, int] | None
    """(height, width); None without images."""
    make_model: ModelFunction | None = None
    """Makes a model of the user's own; None for those that a configuration describes."""
    is_own: bool = False
    """Whether they are the user's own: no configuration describes them then."""
    inputs_code: str = ""
    """Identity of the code that makes the model's inputs of the columns, `CustomData.collate`."""

    @property
    def description(self) -> DataDescription:
        """What a model must know of the data."""
        first = self.train.streams[0]
        return describe(self.tasks, self.image_size, first.normalize, first.inputs)

    @property
    def fingerprint(self) -> str:
        """What a result may be kept under: of the samples' content and, for data of the user's own,
        of their description and of the code that makes inputs; a configuration describes the others."""
        final = "" if self.final is None else self.final.fingerprint
        described = f"{digest(self.description)}{self.inputs_code}" if self.is_own else ""
        return f"{self.train.fingerprint}{self.evaluation.fingerprint}{final}{described}"

    @property
    def reads_storage(self) -> bool:
        """Whether samples of a split that every epoch needs are read from storage each time."""
        from repmtl_ray.data.cache import CachedSplit

        return not all(isinstance(split, CachedSplit) for split in (self.train, self.evaluation))

    @property
    def is_streamed(self) -> bool:
        """Whether any split has rows that come in their own order alone."""
        from repmtl_ray.data.streamed import StreamedSplit

        return any(isinstance(split, StreamedSplit) for split in (self.train, self.evaluation))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results must know of the samples, one sentence each."""
        splits = (split for split in (self.train, self.evaluation, self.final) if split is not None)
        notes = (note for split in splits for stream in split.streams for note in stream.notes)
        return tuple(dict.fromkeys(notes))


class NotePosition(Callback):
    """Notes where the first worker is, for whoever prints that a worker was lost."""

    def __init__(self, folder: str) -> None:
        self._position = RunPosition(folder)

    def on_step_end(self, step: StepInfo) -> None:
        self._position.note_step(step.global_step)


class _ReportToTrain(Callback):
    """Hands every epoch's metrics to Ray Train, with the checkpoint that was made of it."""

    def __init__(self, checkpointing: FaultTolerance) -> None:
        self._checkpointing = checkpointing

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        ray.train.report({**metrics, "checkpoint_path": self._checkpointing.checkpoint})


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What runs in every Ray Train worker."""
    from ray.train.torch import get_device

    from repmtl_ray.runs.fault_tolerance import FaultTolerance

    experiment: Experiment = config["experiment"]
    workers = collectives.current()
    problem = node_check.first_problem(
        node_check.problem_on_this_node(config["driver_note"]), workers, get_device()
    )
    if problem:
        return {"error": problem, "notes": []}
    checkpointing = FaultTolerance(config["directory"], config["checkpoints"], workers)
    try:  # what every worker finds alike, and would find again after a restart, is an outcome
        outcome = _train(config, checkpointing, workers)
    except ExperimentError as error:
        outcome = {"error": str(error)}
    except Exception as error:
        fault = checkpointing.fault_of(error, experiment)
        if fault is None or workers.size > 1:
            raise  # the others wait for this one; the next attempt reads why it failed
        outcome = {"error": fault}
    return {**outcome, "notes": checkpointing.manager.notes}


def _train(
    config: Mapping[str, Any], checkpointing: FaultTolerance, workers: Workers
) -> dict[str, Any]:
    """Goes on where the run stands, to its end."""
    from ray.train.torch import get_device

    from repmtl_ray.runs import loop

    experiment: Experiment = config["experiment"]
    data: CachedData = config["data"]
    loop.selected_tasks(experiment, data.tasks)
    resume_from = checkpointing.start()
    callbacks: list[Callback] = []
    if workers.rank == 0:
        RunPosition(checkpointing.folder).note_start(resume_from)
        callbacks.append(NotePosition(checkpointing.folder))
    if config["baseline"] is not None:
        callbacks.append(AddDeltaP(config["baseline"]))
    num_before = 0
    if resume_from is not None:
        history = read_marker(resume_from).history
        num_before = len(history)
        if history:  # the last report before an interruption may not have been heard
            ray.train.report({**history[-1], "checkpoint_path": resume_from})
    notes = checkpointing.manager.notes
    with data_actors(experiment, data, workers, config["placement"], notes) as loader:
        parts, progress = loop.run(
            experiment,
            train=split_of(data, data.train, loader),
            evaluation=split_of(data, data.evaluation, loader),
            checkpoints=checkpointing,
            callbacks=[*callbacks, *config["callbacks"], _ReportToTrain(checkpointing)],
            resume_from=resume_from,
            data=data.fingerprint,
            workers=workers,
            device=get_device(),
        )
    best = checkpointing.best()
    return {
        "history": progress.history,
        "epochs_now": len(progress.history) - num_before,
        "checkpoint": checkpointing.checkpoint,
        "best_checkpoint": best,
        "final": evaluate_final(
            experiment,
            data,
            parts,
            folder=checkpointing.folder,
            best=best,
            workers=workers,
            device=get_device(),
        ),
    }


def evaluate_final(
    experiment: Experiment,
    data: CachedData,
    parts: Parts,
    *,
    folder: str,
    best: str,
    workers: Workers,
    device: torch.device,
) -> dict[str, float] | None:
    """`final.evaluate_best` on the run's official split; None if it has no such split."""
    from repmtl_ray.runs import final

    if data.final is None:
        return None
    return final.evaluate_best(
        experiment,
        parts.model,
        split_of(data, data.final),
        directory=folder,
        best=best,
        workers=workers,
        device=device,
    )


@contextlib.contextmanager
def data_actors(
    experiment: Experiment,
    data: CachedData,
    workers: Workers,
    placement: Placement,
    notes: list[str],
) -> Iterator[Loader | None]:
    """This worker's data actors, or the reader of streamed rows; None if its own threads make the
    batches.

    Args:
        experiment, data, workers: of the run.
        placement: of the run, its data actors decided.
        notes: gets what a user should know of the actors.
    """
    if not placement.data_cpus:
        yield None
        return
    from repmtl_ray.data.data_actor import RunBatches
    from repmtl_ray.data.ray_pipeline import RayLoader
    from repmtl_ray.data.streamed_loader import StreamedLoader
    from repmtl_ray.runs import build

    tasks = build.selected_tasks(experiment, data.tasks)
    batches = RunBatches(
        train=build.train_plan(experiment, tasks, data.train.streams, workers),
        evaluation=build.eval_plan(experiment, tasks, data.evaluation.streams, workers),
        train_split=data.train,
        eval_split=data.evaluation,
    )
    if data.is_streamed:
        with _reader_of(batches, placement.data_cpus) as reader:
            yield StreamedLoader(batches, reader)
        return
    loader = RayLoader(
        batches,
        num_epochs=experiment.epochs,
        num_actors=placement.data_cpus,
        timeout_s=float(os.environ.get(cluster.GROUP_START_TIMEOUT, "900")),
        may_fall_back=placement.data == "auto",
    )
    try:
        yield loader
    finally:
        loader.close()
        if loader.note:
            notes.append(loader.note)


@contextlib.contextmanager
def _reader_of(batches: RunBatches, cpus_per_worker: int) -> Iterator[Reader]:
    """The reader of a run, which the first worker starts and ends.

    Args:
        batches: of the run, for this worker.
        cpus_per_worker: that Ray Data may use.
    """
    from repmtl_ray.data.streamed_loader import start_reader

    workers, reader = batches.train.workers, None
    name = f"row reader {uuid.uuid4().hex}"
    if workers.rank == 0:
        reader = start_reader(batches, num_cpus=cpus_per_worker * workers.size, name=name)
    if workers.size > 1:
        name = ray.train.collective.broadcast_from_rank_zero(name)
    try:
        yield reader or ray.get_actor(name)
    finally:
        if reader is not None:
            ray.kill(reader)


def split_of(data: CachedData, checked: CheckedSplit, loader: Loader | None = None) -> Split:
    """The samples of one split, as the loop takes them."""
    from repmtl_ray.runs.build import Split

    return Split(
        streams=checked.streams,
        rows={stream.name: checked.rows(stream) for stream in checked.streams},
        tasks=data.tasks,
        image_size=data.image_size,
        loader=loader,
        make_model=data.make_model,
    )
