"""A trial whose run has one worker: the run trains in the trial's own process, an epoch a step.

Owns what Ray Tune calls. Tune uses the process of a trial that has ended, or that was stopped early,
for the next trial: imports, the node's check and the mapped samples are there already. A run with
several workers is one of Ray Train, for which its trial waits.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray import tune as ray_tune

from repmtl_ray import node_check, ray_compat
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import ExperimentError
from repmtl_ray.delta import delta_p
from repmtl_ray.placement import Placement
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import tune_reporting
from repmtl_ray.runs.callbacks import AddDeltaP, Callback
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.runs.fault_tolerance import FaultTolerance
from repmtl_ray.runs.worker import (
    CachedData,
    NotePosition,
    data_actors,
    evaluate_final,
    split_of,
)
from repmtl_ray.runs.worker_loss import RunPosition
from repmtl_ray.search.run_records import METRIC, Run, make_record, write_failure, write_record
from repmtl_ray.train import FitResult, finished, train

if TYPE_CHECKING:
    import torch

    from repmtl_ray.data.batches import Loader
    from repmtl_ray.runs import loop
    from repmtl_ray.runs.build import Split

logger = logging.getLogger(__name__)

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """What the trials of a study share.

    Args:
        data: the samples.
        placement: of every run's workers.
        folder: path or URI that has the runs' folders ("runs") and records ("records").
        baseline: single-task metrics that every epoch's delta_p is relative to; None without one.
        facts: what all records say.
        checkpoints, callbacks: as for `fit`.
        driver_note: for the check of the node that a trial lands on.
    """

    data: CachedData
    placement: Placement
    folder: str
    baseline: Mapping[str, float] | None
    facts: Mapping[str, Any]
    checkpoints: CheckpointConfig | None = None
    callbacks: Sequence[Callback] = ()
    driver_note: node_check.DriverNote | None = None

    def write_record(self, run: Run, result: FitResult, seconds: float) -> None:
        """Leaves the record of a run that has ended."""
        record = make_record(
            run.experiment,
            {**self.facts, **run.facts},
            result.history,
            checkpoint=result.checkpoint,
            seconds=seconds,
            final=result.final,
        )
        write_record(self.folder, run.name, record)

    def result_of_finished(self, result: FitResult) -> Result:
        """What Ray Tune is told of a run that had finished before an interruption."""
        metrics = dict(result.metrics)
        if self.baseline is not None:
            delta = delta_p(metrics, self.baseline)
            metrics.update(delta_p_task=delta.task, delta_p_metric=delta.metric)
        return {**metrics, "checkpoint_path": result.checkpoint}


class _NodeNotice:
    """Looks once every `POLL_S` seconds whether this node is about to go: it asks Ray's head."""

    POLL_S = 1.0

    def __init__(self) -> None:
        self._next_s = 0.0
        self._notice: ray_compat.PreemptionNotice | None = None

    def __call__(self) -> ray_compat.PreemptionNotice | None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self.POLL_S
            self._notice = ray_compat.node_notice() or self._notice
        return self._notice


class RunsInProcess:
    """Trains one run of one worker after the other in this process.

    What runs share is made once: imports, the check of this node, the samples that are mapped.

    Args:
        settings: of the study.
    """

    def __init__(self, settings: TrialSettings) -> None:
        self._settings = settings
        self._splits: dict[str, Split] = {}
        self._is_checked = False

    def results(self, run: Run) -> Generator[Result, None, None]:
        """Trains a run from where it stands; gives what Ray Tune is told, the last with "done".

        A run that cannot be done ends with "error". Closing the generator stops the run early.
        """
        begin_s = time.monotonic()
        settings, folder = self._settings, f"{self._settings.folder}/runs/{run.name}"
        with hold(folder, "run", wait=True):
            try:
                result = finished(folder, run.trained, settings.data)
                if result is None:
                    result = yield from self._epochs(run, folder)
                    last = {**result.metrics, "checkpoint_path": result.checkpoint}
                else:
                    last = settings.result_of_finished(result)
                settings.write_record(run, result, time.monotonic() - begin_s)
            except ExperimentError as error:  # would be the same again: Ray Tune must not retry
                last = {"error": str(error), METRIC: math.nan}
                write_failure(settings.folder, run, str(error))
            except GeneratorExit:
                return
        yield {**last, "done": True}

    def _epochs(self, run: Run, folder: str) -> Generator[Result, None, FitResult]:
        """Trains; gives every epoch but the last, which is the return value's."""
        from repmtl_ray.runs import loop

        settings, experiment = self._settings, run.trained
        device = self._device()
        checkpointing = FaultTolerance(
            folder,
            settings.checkpoints or CheckpointConfig(),
            ALONE,
            notice=_NodeNotice(),
        )
        try:
            loop.selected_tasks(experiment, settings.data.tasks)
            resume_from = checkpointing.start()
            notes = checkpointing.manager.notes
            with data_actors(experiment, settings.data, ALONE, settings.placement, notes) as loader:
                training = self._training(run, checkpointing, resume_from, loader, device)
                num_before = training.progress.epochs_done
                if num_before:  # the last report before an interruption may not have been heard
                    repeated = training.progress.history[-1]
                    yield {**repeated, "checkpoint_path": checkpointing.checkpoint}
                for metrics in training.epochs():
                    if metrics["epoch"] < experiment.epochs:
                        yield {**metrics, "checkpoint_path": checkpointing.checkpoint}
            best = checkpointing.best()
            final = evaluate_final(
                experiment,
                settings.data,
                training.parts,
                folder=folder,
                best=best,
                workers=ALONE,
                device=device,
            )
        except ExperimentError:
            raise
        except Exception as error:
            fault = checkpointing.fault_of(error, experiment)
            if fault is None:
                raise
            raise ExperimentError(fault) from error
        history = training.progress.history
        assert checkpointing.checkpoint is not None, "every epoch leaves a checkpoint"
        return FitResult(
            metrics=history[-1],
            history=history,
            checkpoint=checkpointing.checkpoint,
            best_checkpoint=best,
            epochs_now=len(history) - num_before,
            final=final,
            notes=settings.data.notes,
        )

    def _training(
        self,
        run: Run,
        checkpointing: FaultTolerance,
        resume_from: str | None,
        loader: Loader | None,
        device: torch.device,
    ) -> loop.Training:
        """A run as its newest checkpoint left it, or at its beginning."""
        from repmtl_ray.runs import loop

        settings = self._settings
        for note in checkpointing.manager.notes:
            logger.warning(note)
        RunPosition(checkpointing.folder).note_start(resume_from)
        callbacks: list[Callback] = [NotePosition(checkpointing.folder)]
        if settings.baseline is not None:
            callbacks.append(AddDeltaP(settings.baseline))
        callbacks += copy.deepcopy(list(settings.callbacks))  # another run's may come after it
        return loop.Training(
            run.trained,
            train=dataclasses.replace(self._split("train"), loader=loader),
            evaluation=dataclasses.replace(self._split("evaluation"), loader=loader),
            checkpoints=checkpointing,
            callbacks=callbacks,
            resume_from=resume_from,
            data=settings.data.fingerprint,
            device=device,
        )

    def _split(self, name: Literal["train", "evaluation"]) -> Split:
        """A split, whose samples stay mapped from run to run."""
        if name not in self._splits:
            checked = getattr(self._settings.data, name)
            self._splits[name] = split_of(self._settings.data, checked)
        return self._splits[name]

    def _device(self) -> torch.device:
        """This trial's GPU if its placement has one; the node is checked before its first run."""
        import torch

        has_gpu = self._settings.placement.gpus_per_worker > 0
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(device)
        if not self._is_checked:
            problem = node_check.problem_on_this_node(self._settings.driver_note)
            if problem:
                raise ExperimentError(problem)
            self._is_checked = True
        return device


class InProcessTrial(ray_tune.Trainable):
    """One run after the other, an epoch per step."""

    def setup(self, config: dict[str, Any], settings: TrialSettings | None = None) -> None:
        """Nothing is done here that can fail: Ray Tune would not try it again."""
        assert settings is not None, "Ray Tune gives it by `with_parameters`"
        self._runs = RunsInProcess(settings)
        self._results: Generator[Result, None, None] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next run, in the same process."""
        self.cleanup()
        return True

    def step(self) -> Result:
        if self._results is None:
            self._results = self._runs.results(self.config["run"])
        return next(self._results)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Leaves a run that Ray Tune pauses; its own folder has the checkpoint of its last epoch."""
        self.cleanup()
        return {"run": self.config["run"].name}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: a run goes on from its own folder, into which `pbt.py` copies what it takes
        over."""

    def cleanup(self) -> None:
        """Leaves a run that is stopped early or paused, and frees its memory."""
        if self._results is not None:
            self._results.close()
            self._results = None
        gc.collect()
        _empty_gpu_cache()


def _empty_gpu_cache() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_with_ray_train(config: dict[str, Any], *, settings: TrialSettings) -> None:
    """One trial of Ray Tune that waits for a Ray Train run, whose every report it hands on; for
    runs of several workers."""
    run: Run = config["run"]
    begin_s = time.monotonic()
    with (
        hold(f"{settings.folder}/runs/{run.name}", "run", wait=True),
        tune_reporting.reporting_to_tune() as reports,
    ):
        result = train(
            run.experiment,
            settings.data,
            placement=settings.placement,
            storage=f"{settings.folder}/runs",
            name=run.name,
            checkpoints=settings.checkpoints,
            baseline=settings.baseline,
            callbacks=[reports],
            loop_callbacks=settings.callbacks,
        )
    settings.write_record(run, result, time.monotonic() - begin_s)
    if result.epochs_now == 0:  # no report went through
        ray_tune.report(settings.result_of_finished(result))


DRIVER = {"node:__internal_head__": 0.001}
"""A trial waits for its run's workers; any CPU it took would be one that they wait for."""


def in_process(settings: TrialSettings) -> Any:
    """What Ray Tune runs as the trials of runs of one worker."""
    resources = {"CPU": settings.placement.cpus_per_worker}
    if settings.placement.gpus_per_worker > 0:
        resources["GPU"] = settings.placement.gpus_per_worker
    return ray_tune.with_resources(
        ray_tune.with_parameters(InProcessTrial, settings=settings), resources
    )


def with_ray_train(settings: TrialSettings) -> Any:
    """What Ray Tune runs as the trials of runs of several workers."""
    return ray_tune.with_resources(
        ray_tune.with_parameters(run_with_ray_train, settings=settings), DRIVER
    )
