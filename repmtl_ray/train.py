"""One experiment on Ray Train: `fit`, and the loop that each of its workers runs.

Owns how a run uses Ray Train. What happens in an epoch is `runs/loop.py`; this module gives it
workers, data from the object store, and another life after a worker died; `runs/fault_tolerance.py` and
`runs/checkpoint_manager.py` give it checkpoints in the run's storage.

Two more processes than the workers import this module for every run (Tune's driver and Train's
controller), so what they do not need (models, policies, data) is imported where it is used: seconds
of every trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from repmtl_ray import node_check, ray_compat
from repmtl_ray.config import (
    Experiment,
    ExperimentError,
)
from repmtl_ray.conversion import shown
from repmtl_ray.placement import Placement
from repmtl_ray.placement_group_cleanup import ended_by_interrupt
from repmtl_ray.prepared_run import (
    check_settings,
    expect,
    prepare_run,
    read_samples,
    with_model,
)
from repmtl_ray.run_folder import check_owner, checked_place, claim
from repmtl_ray.run_lock import hold
from repmtl_ray.runs import loggers
from repmtl_ray.runs.callbacks import Callback
from repmtl_ray.runs.checkpoint_manager import (
    CheckpointConfig,
    CheckpointManager,
    read_final,
    read_marker,
)
from repmtl_ray.runs.live import NoteProgress, progress_printed
from repmtl_ray.runs.worker import CachedData, run_worker
from repmtl_ray.runs.worker_loss import NoteLosses, losses_printed

if TYPE_CHECKING:
    from repmtl_ray.data.custom import CustomData
    from repmtl_ray.models.own import ModelFunction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came out of a run.

    Args:
        metrics: of the last epoch, by name ("segmentation/miou", ...).
        history: the metrics of every epoch, also those before a restart.
        checkpoint: path or URI of the last checkpoint (`repmtl_ray.runs.checkpoint`).
        epochs_now: how many of the epochs were trained by this very call; 0 if the run had finished
            before.
        best_checkpoint: of the best epoch (`protocols.best_epoch`).
        final: metrics of the data's final split, if it has one, and the "epoch" chosen for it.
        notes: on the data, one sentence each, for example that its splits are this project's own.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]]
    checkpoint: str
    epochs_now: int
    best_checkpoint: str = ""
    final: dict[str, float] | None = None
    notes: tuple[str, ...] = ()


def fit(
    experiment: Experiment,
    *,
    data: CustomData | None = None,
    model: ModelFunction | None = None,
    placement: Placement | None = None,
    storage: str | Path | None = None,
    name: str | None = None,
    max_failures: int = 3,
    checkpoints: CheckpointConfig | None = None,
    callbacks: Sequence[Callback] = (),
    log: Sequence[str] = (),
    log_every: int = loggers.EVERY_STEPS,
    log_images: int = 0,
    progress: bool = False,
) -> FitResult:
    """Trains one experiment on Ray, here or on the cluster this machine belongs to.

    Args:
        experiment: what to train.
        data: Ray Datasets of your own, with an experiment whose `data.name` is "custom".
        model: makes a model of your own (`repmtl_ray.Model`); a function without arguments, which
            travels to the workers by value.
        placement: its workers; one CPU worker by default. Results do not depend on it (beyond float
            rounding).
        storage: folder or URI (s3://, gs://) for checkpoints, shared by all nodes; by default under
            the home directory.
        name: of the run. Giving the name of a run that was interrupted continues it (and returns at
            once if it had finished); by default a new one.
        max_failures: how many times lost workers are replaced; each time training goes on from the
            last checkpoint. Nodes that Ray was told would go (spot machines) do not count.
        checkpoints: when the run is saved inside an epoch, and what stays; after every epoch, and
            every 15 minutes, by default.
        callbacks: what else happens at the moments of the run (`runs/callbacks.py`); every worker
            has its own copies.
        log: writers of the run's numbers, of "csv", "tensorboard", "mlflow" and "wandb"
            (`runs/loggers.py`).
        log_every: steps between two that they write; 0 writes epochs alone.
        log_images: samples of the evaluation split whose predictions they write as pictures after
            every epoch; a forward pass of so many samples each.
        progress: print a line for every epoch, and in a terminal a bar.

    Returns:
        The last epoch's metrics, all epochs' history, and the checkpoint.

    Raises:
        ValueError: bad input or a storage that cannot be used, before anything is trained; the name
            is in use by another process; or training diverges (task, policy and step are named).
        KeyboardInterrupt: as `run_lock.Interrupted`; the same name continues the run.
        ray.train.TrainingFailedError: workers were lost more often than `max_failures`.
    """
    _check_arguments(name, max_failures, checkpoints)
    callbacks = loggers.checked_callbacks(callbacks, log, log_every, log_images)
    experiment = with_model(experiment, model)
    placement = check_settings(experiment, Placement() if placement is None else placement, data)
    root, name = checked_place(storage, name, "fit", experiment)
    directory = f"{root}/{name}"
    loggers.check_place(log, directory)
    check_owner(directory, experiment)
    print(f"run {name} in {root}", flush=True)
    prepared = prepare_run(experiment, placement=placement, data=data, model=model)
    shown = progress_printed(directory) if progress else contextlib.nullcontext()
    with hold(directory, "run"), losses_printed(directory), shown:
        note = claim(directory, experiment, prepared.own_data)
        node_check.check_nodes(directory)
        result = train(
            experiment,
            read_samples(prepared),
            placement=placement,
            storage=root,
            name=name,
            max_failures=max_failures,
            checkpoints=checkpoints,
            loop_callbacks=[*callbacks, *([NoteProgress()] if progress else [])],
        )
    return dataclasses.replace(result, notes=(*result.notes, *([note] if note else [])))


def _check_arguments(name: object, max_failures: object, checkpoints: object) -> None:
    expect("name", name, str, optional=True)
    expect("checkpoints", checkpoints, CheckpointConfig, optional=True)
    if type(max_failures) is not int or max_failures < -1:
        raise ValueError(
            f"max_failures is {shown(max_failures)}; expected an integer >= 0, or -1 for no limit."
        )


def train(
    experiment: Experiment,
    data: CachedData,
    *,
    placement: Placement,
    storage: str,
    name: str,
    max_failures: int = 3,
    checkpoints: CheckpointConfig | None = None,
    baseline: Mapping[str, float] | None = None,
    callbacks: Sequence[Any] = (),
    loop_callbacks: Sequence[Callback] = (),
) -> FitResult:
    """`fit` without its checks, on data already cached; what a Tune trial calls.

    Args:
        experiment, placement, storage, name, max_failures, checkpoints: as for `fit`.
        data: from `prepared_run.read_samples`.
        baseline: single-task metrics; adds "delta_p_task" and "delta_p_metric" to every epoch's
            metrics.
        callbacks: Ray Train callbacks; they see every epoch's metrics and its "checkpoint_path".
        loop_callbacks: of the loop (`runs/callbacks.py`), in every worker.
    """
    folder = f"{storage}/{name}"
    done = finished(folder, experiment, data)
    if done is not None:
        return done
    placement = placement.decided(runs=1, reads_storage=data.reads_storage)
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # may return a value in Train V2
        train_loop_config={
            "experiment": experiment,
            "data": data,
            "baseline": None if baseline is None else dict(baseline),
            "placement": placement,
            "directory": folder,
            "checkpoints": checkpoints or CheckpointConfig(),
            "callbacks": list(loop_callbacks),
            "driver_note": node_check.write_driver_note(folder),
        },
        scaling_config=_scaling(placement),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(  # type: ignore[call-arg]  # annotated as Train V1's
                max_failures=max_failures, controller_failure_limit=3
            ),
            callbacks=[*callbacks, NoteLosses(folder)],  # type: ignore[list-item]  # as Train V1's
        ),
    )
    ray_compat.leave_interrupts_to_caller(trainer)
    with ended_by_interrupt(), ray_compat.address_known_to_run():
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]  # annotated as Train V1's
    if outcome is None:
        raise RuntimeError(f"run {name!r} in {storage} ended without a result.")
    return _result(outcome, data)


def _result(outcome: Mapping[str, Any], data: CachedData) -> FitResult:
    """What the workers returned; their notes are printed, and an error of theirs is raised."""
    for note in outcome["notes"]:
        logger.warning(note)
    if "error" in outcome:
        raise ExperimentError(outcome["error"])
    history = outcome["history"]
    return FitResult(
        metrics=history[-1],
        history=history,
        checkpoint=outcome["checkpoint"],
        best_checkpoint=outcome["best_checkpoint"],
        epochs_now=outcome["epochs_now"],
        final=outcome["final"],
        notes=data.notes,
    )


def _scaling(placement: Placement) -> ScalingConfig:
    """What Ray Train reserves for the workers."""
    resources = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker > 0:
        resources["GPU"] = placement.gpus_per_worker
    return ScalingConfig(
        num_workers=placement.num_workers,  # type: ignore[arg-type]  # annotated as Train V1's
        use_gpu=placement.gpus_per_worker > 0,
        resources_per_worker=resources,
    )


def finished(folder: str, experiment: Experiment, data: CachedData) -> FitResult | None:
    """The result of a run that had ended before, without starting anything; None if it had not.

    Args:
        folder: of the run.
        experiment: that it is known to belong to.
        data: its samples.
    """
    manager = CheckpointManager(folder)
    newest = manager.latest()
    if newest is None:
        return None
    marker = read_marker(newest)
    if marker.epochs_done < experiment.epochs or marker.data != data.fingerprint:
        return None
    final = None if data.final is None else read_final(folder)
    if data.final is not None and final is None:
        return None
    return FitResult(
        metrics=marker.history[-1],
        history=marker.history,
        checkpoint=newest,
        best_checkpoint=manager.best() or newest,
        epochs_now=0,
        final=final,
        notes=data.notes,
    )
