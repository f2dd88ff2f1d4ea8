"""One experiment on Ray Train: `fit`, and the loop that each of its workers runs.

Owns the only use of Ray Train. What happens in an epoch is `loop.py`; this module gives it workers,
data from the object store, checkpoints in the run's storage, and another life after a worker died.

Two more processes than the workers import this module for every run (Tune's driver and Train's
controller), so what they do not need (models, policies, data) is imported where it is used: seconds
of every trial.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from repmtl_ray import cluster, collectives
from repmtl_ray.cluster import Placement
from repmtl_ray.config import (
    Experiment,
    ExperimentError,
    differences,
    digest,
    from_dict,
    to_dict,
)
from repmtl_ray.delta import delta_p
from repmtl_ray.storage import absolute, exists, read_text, write_text

if TYPE_CHECKING:
    from repmtl_ray.data.cache import CachedSplit
    from repmtl_ray.loop import Split

CHECKPOINTS_KEPT = 2
EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True, kw_only=True)
class CachedData:
    """The samples of an experiment, read, checked and kept in Ray's object store; small enough to
    hand around."""

    train: CachedSplit
    evaluation: CachedSplit
    final: CachedSplit | None = None
    """The split that is read once, at the end, with the best epoch's weights (protocols.py)."""

    @property
    def fingerprint(self) -> str:
        """Of the samples' content; what a result may be kept under."""
        final = "" if self.final is None else self.final.fingerprint
        return f"{self.train.fingerprint}{self.evaluation.fingerprint}{final}"


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came out of a run.

    Args:
        metrics: of the last epoch, by name ("segmentation/miou", ...).
        history: the metrics of every epoch, also those before a restart.
        checkpoint: path or URI of the last checkpoint (`repmtl_ray.checkpoint`).
        epochs_now: how many of the epochs were trained by this very call; 0 if the run had finished
            before.
        final: metrics of the data's final split, if it has one, and the "epoch" chosen for it.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]]
    checkpoint: str
    epochs_now: int
    final: dict[str, float] | None = None


def cache_data(
    experiment: Experiment, final_split: Literal["val", "test"] | None = None
) -> CachedData:
    """Reads the splits once, in parallel; every fault of the data shows here, before anything is
    trained."""
    from repmtl_ray.data.cache import cache_streams
    from repmtl_ray.data.sources import open_streams

    train = open_streams(experiment.data, "train")
    evaluation = open_streams(experiment.data, experiment.data.eval_split)
    for note in dict.fromkeys(note for stream in (*train, *evaluation) for note in stream.notes):
        print(f"note: {note}", flush=True)
    final = None if final_split is None else open_streams(experiment.data, final_split)
    return CachedData(
        train=cache_streams(train),
        evaluation=cache_streams(evaluation),
        final=None if final is None else cache_streams(final),
    )


def preflight(experiment: Experiment, placement: Placement) -> None:
    """Finds what would fail later: policy, tasks, batch, encoder, weights, resources.

    Raises:
        ValueError: where, what was found, what to do.
    """
    from repmtl_ray import loop
    from repmtl_ray.data.sources import image_size, open_streams
    from repmtl_ray.models import build_model

    workers = placement.num_workers
    if experiment.batch_size % workers:
        below = experiment.batch_size - experiment.batch_size % workers
        near = " or ".join(str(size) for size in (below, below + workers) if size)
        raise ValueError(
            f"batch_size is {experiment.batch_size} over {workers} workers; the global batch must divide evenly: take {near}."
        )
    tasks = loop.selected_tasks(experiment)
    loop.num_steps(experiment, open_streams(experiment.data, "train"))
    open_streams(experiment.data, experiment.data.eval_split)
    build_model(experiment.model, tasks, image_size=image_size(experiment.data))
    placement.check_fits()


def fit(
    experiment: Experiment,
    *,
    placement: Placement | None = None,
    storage: str | Path | None = None,
    name: str | None = None,
    max_failures: int = 3,
) -> FitResult:
    """Trains one experiment on Ray, here or on the cluster this machine belongs to.

    Args:
        experiment: what to train.
        placement: its workers; one CPU worker by default. Results do not depend on it (beyond float
            rounding).
        storage: folder or URI (s3://, gs://) for checkpoints, shared by all nodes; by default under
            the home directory.
        name: of the run. Giving the name of a run that was interrupted continues it (and returns at
            once if it had finished); by default a new one.
        max_failures: how many times lost workers are replaced; each time training goes on from the
            last checkpoint.

    Returns:
        The last epoch's metrics, all epochs' history, and the checkpoint.

    Raises:
        ValueError: bad input, before anything is trained; or training diverges (task, policy and
            step are named).
        ray.train.TrainingFailedError: workers were lost more often than `max_failures`.
    """
    placement = placement or Placement()
    cluster.connect()
    preflight(experiment, placement)
    root, name = absolute(storage), name or fresh_name("fit", experiment)
    claim(f"{root}/{name}", experiment)
    return train(
        experiment,
        cache_data(experiment),
        placement=placement,
        storage=root,
        name=name,
        max_failures=max_failures,
    )


def claim(directory: str, experiment: Experiment) -> None:
    """Notes in the folder of a run or a search whose it is.

    Raises:
        ValueError: it belongs to another experiment.
    """
    note = f"{directory}/{EXPERIMENT_FILE}"
    if not exists(note):
        write_text(note, json.dumps(to_dict(experiment), indent=2) + "\n")
        return
    stored = from_dict(Experiment, json.loads(read_text(note)))
    if stored != experiment:
        raise ValueError(
            f"{directory} belongs to another experiment: {differences(stored, experiment)}. "
            "Continue it with the same configuration, or give another name."
        )


def fresh_name(kind: str, experiment: Experiment) -> str:
    """A run name that no earlier run has."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{digest(experiment)}"


def train(
    experiment: Experiment,
    data: CachedData,
    *,
    placement: Placement,
    storage: str,
    name: str,
    max_failures: int = 3,
    baseline: Mapping[str, float] | None = None,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    """`fit` without its checks, on data already cached; what a Tune trial calls.

    Args:
        experiment, placement, storage, name, max_failures: as for `fit`.
        data: from `cache_data`.
        baseline: single-task metrics; adds "delta_p_task" and "delta_p_metric" to every epoch's
            metrics.
        callbacks: Ray Train callbacks.
    """
    use_gpu = placement.gpus_per_worker > 0
    resources = {"CPU": placement.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = placement.gpus_per_worker
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]  # may return a value in Train V2
        train_loop_config={
            "experiment": to_dict(experiment),
            "data": data,
            "baseline": None if baseline is None else dict(baseline),
            "directory": f"{storage}/{name}",
        },
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(  # type: ignore[call-arg]  # annotated as Train V1's
                max_failures=max_failures, controller_failure_limit=3
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            callbacks=list(callbacks),
        ),
    )
    result = trainer.fit()
    outcome = result.return_value  # type: ignore[attr-defined]  # annotated as Train V1's
    if outcome is not None and "error" in outcome:
        raise ExperimentError(outcome["error"])
    if outcome is None or result.checkpoint is None:
        raise RuntimeError(f"run {name!r} in {storage} ended without a result; see {result.path}.")
    history = outcome["history"]
    return FitResult(
        metrics=history[-1],
        history=history,
        checkpoint=result.checkpoint.path,
        epochs_now=outcome["epochs_now"],
        final=outcome["final"],
    )


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What runs in every Ray Train worker."""
    from ray.train.torch import get_device

    from repmtl_ray import checkpoint as checkpoints
    from repmtl_ray import final, loop

    experiment = from_dict(Experiment, config["experiment"])
    data: CachedData = config["data"]
    workers = collectives.current()
    baseline = config["baseline"]

    epochs_now = 0
    best: final.BestEpoch | None = None

    def report(metrics: dict[str, float], write: Any) -> None:
        nonlocal epochs_now
        epochs_now += 1
        if baseline is not None:
            delta = delta_p(metrics, baseline)
            metrics.update(delta_p_task=delta.task, delta_p_metric=delta.metric)
        if workers.rank != 0:
            ray.train.report(metrics, checkpoint=None)
            return
        if best is not None:
            best.after_epoch(metrics, write)
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    def go(resume_from: str | None) -> dict[str, Any]:
        nonlocal best
        if data.final is not None and workers.rank == 0:
            done = checkpoints.read_state(resume_from)["progress"] if resume_from else {}
            best = final.BestEpoch(config["directory"], done.get("history", ()))
        final_metrics = None
        try:  # what every worker finds alike, and would find again after a restart, is an outcome
            loop.selected_tasks(experiment)
            parts, progress = loop.run(
                experiment,
                train=_split(data.train),
                evaluation=_split(data.evaluation),
                report=report,
                resume_from=resume_from,
                workers=workers,
                device=get_device(),
            )
            if data.final is not None:
                final_metrics = final.evaluate_best(
                    experiment,
                    parts.model,
                    _split(data.final),
                    directory=config["directory"],
                    history=progress.history,
                    workers=workers,
                    device=get_device(),
                )
        except ExperimentError as error:
            return {"error": str(error)}
        return {"history": progress.history, "epochs_now": epochs_now, "final": final_metrics}

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return go(None)
    with checkpoint.as_directory() as directory:
        return go(directory)


def _split(cached: CachedSplit) -> Split:
    from repmtl_ray.loop import Split

    return Split(
        streams=cached.streams, rows={stream.name: cached.rows(stream) for stream in cached.streams}
    )
