"""What every worker of a Ray Train run gets and does: go on where the run stands, train, report.

Owns the loop's place inside Ray Train; the epochs are `loop.py`'s, how a run survives is
`fault_tolerance.py`'s. What only a worker needs is imported when it runs: Tune's driver and Train's
controller import this module too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray.train

from repmtl_ray import collectives, node_check
from repmtl_ray.config import Experiment, ExperimentError, digest
from repmtl_ray.data.description import DataDescription, describe
from repmtl_ray.delta import delta_p
from repmtl_ray.runs.checkpoint_manager import read_marker
from repmtl_ray.runs.worker_loss import RunPosition

if TYPE_CHECKING:
    from repmtl_ray.data.cache import CheckedSplit
    from repmtl_ray.runs.loop import Split
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
    image_size: tuple[int, int]
    """(height, width)."""
    is_own: bool = False
    """Whether they are the user's own: no configuration describes them then."""

    @property
    def description(self) -> DataDescription:
        """What a model must know of the data."""
        return describe(self.tasks, self.image_size, self.train.streams[0].normalize)

    @property
    def fingerprint(self) -> str:
        """What a result may be kept under: of the samples' content and, for data of the user's own,
        of their description; a configuration describes the others."""
        final = "" if self.final is None else self.final.fingerprint
        described = digest(self.description) if self.is_own else ""
        return f"{self.train.fingerprint}{self.evaluation.fingerprint}{final}{described}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results must know of the samples, one sentence each."""
        splits = (split for split in (self.train, self.evaluation, self.final) if split is not None)
        notes = (note for split in splits for stream in split.streams for note in stream.notes)
        return tuple(dict.fromkeys(notes))


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What runs in every Ray Train worker."""
    from ray.train.torch import get_device

    from repmtl_ray.runs import fault_tolerance, final, loop

    experiment: Experiment = config["experiment"]
    data: CachedData = config["data"]
    workers = collectives.current()
    baseline = config["baseline"]
    problem = node_check.first_problem(
        node_check.problem_on_this_node(config["driver_note"]), workers, get_device()
    )
    if problem:
        return {"error": problem, "notes": []}
    checkpointing = fault_tolerance.FaultTolerance(
        config["directory"], config["checkpoints"], workers
    )
    position = RunPosition(config["directory"])
    epochs_now = 0

    def after_step(epochs_done: int, step_in_epoch: int, global_step: int, write: Any) -> None:
        checkpointing.after_step(epochs_done, step_in_epoch, global_step, write)
        if workers.rank == 0:
            position.note_step(global_step)

    def report(metrics: dict[str, float], write: Any) -> None:
        nonlocal epochs_now
        epochs_now += 1
        if baseline is not None:
            delta = delta_p(metrics, baseline)
            metrics.update(delta_p_task=delta.task, delta_p_metric=delta.metric)
        checkpointing.after_epoch(int(metrics["epoch"]), int(metrics["global_step"]), write)
        ray.train.report({**metrics, "checkpoint_path": checkpointing.checkpoint})

    def go() -> dict[str, Any]:
        loop.selected_tasks(experiment, data.tasks)
        resume_from = checkpointing.start()
        if workers.rank == 0:
            position.note_start(resume_from)
        if resume_from is not None:
            _report_again(read_marker(resume_from).history, resume_from)
        parts, progress = loop.run(
            experiment,
            train=_split(data, data.train),
            evaluation=_split(data, data.evaluation),
            report=report,
            after_step=after_step,
            resume_from=resume_from,
            data=data.fingerprint,
            workers=workers,
            device=get_device(),
        )
        best = checkpointing.best()
        final_metrics = None
        if data.final is not None:
            final_metrics = final.evaluate_best(
                experiment,
                parts.model,
                _split(data, data.final),
                directory=config["directory"],
                best=best,
                workers=workers,
                device=get_device(),
            )
        return {
            "history": progress.history,
            "epochs_now": epochs_now,
            "checkpoint": checkpointing.checkpoint,
            "best_checkpoint": best,
            "final": final_metrics,
        }

    try:  # what every worker finds alike, and would find again after a restart, is an outcome
        outcome = go()
    except ExperimentError as error:
        outcome = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not fault_tolerance.is_out_of_memory(error):
            raise
        outcome = {"error": checkpointing.out_of_memory(error, experiment)}
        if workers.size > 1:
            raise  # the others wait for this one; the next attempt reads why it failed
    return {**outcome, "notes": checkpointing.manager.notes}


def _report_again(history: list[dict[str, float]], checkpoint: str) -> None:
    """The last epoch before an interruption: its report may not have been heard."""
    if history:
        ray.train.report({**history[-1], "checkpoint_path": checkpoint})


def _split(data: CachedData, checked: CheckedSplit) -> Split:
    from repmtl_ray.runs.loop import Split

    return Split(
        streams=checked.streams,
        rows={stream.name: checked.rows(stream) for stream in checked.streams},
        tasks=data.tasks,
        image_size=data.image_size,
    )
