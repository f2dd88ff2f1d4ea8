"""The chosen epoch's weights, kept while a run trains, and the official split read with them once.

Owns what the protocols need beside checkpoints: a run's best epoch so far as a checkpoint of its
own next to it, and the final evaluation. Every worker calls both functions at the same places. No
Ray.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pyarrow import fs

from repmtl_ray import checkpoint, loop, storage
from repmtl_ray.collectives import Workers
from repmtl_ray.config import Experiment
from repmtl_ray.data.batches import eval_batches
from repmtl_ray.evaluate import evaluate
from repmtl_ray.loop import Split
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.protocols import best_epoch

KEPT = 2
"""Best epochs kept: a run that is resumed may be one epoch behind the newest."""
FINAL_FILE = "final.json"


class BestEpoch:
    """Keeps a checkpoint of the best epoch so far; on the first worker.

    Args:
        directory: path or URI of the run.
        history: of the epochs done before, if the run is resumed.
    """

    def __init__(self, directory: str, history: Sequence[dict[str, float]] = ()) -> None:
        self.directory = directory
        self._history = list(history)
        self._kept: list[str] = []

    def after_epoch(self, metrics: dict[str, float], write: Callable[[Path], None]) -> None:
        """Called with every epoch's metrics, before the epoch's own checkpoint is reported.

        Args:
            metrics: of the evaluation split.
            write: makes a checkpoint in a directory.
        """
        self._history.append(dict(metrics))
        if best_epoch(self._history) != len(self._history):
            return
        with tempfile.TemporaryDirectory() as local:
            write(Path(local))
            kept = _best(self.directory, len(self._history))
            _copy(local, kept)
        if kept not in self._kept:
            self._kept.append(kept)
        while len(self._kept) > KEPT:
            system, path = fs.FileSystem.from_uri(_uri(self._kept.pop(0)))
            system.delete_dir(path)


def evaluate_best(
    experiment: Experiment,
    model: MultiTaskModel,
    split: Split,
    *,
    directory: str,
    history: Sequence[dict[str, float]],
    workers: Workers,
    device: torch.device,
) -> dict[str, float]:
    """The official split, read with the weights of the run's best epoch.

    Args:
        experiment: of the run.
        model: of the run; has the best epoch's weights afterwards.
        split: the official one.
        directory: path or URI of the run, where `BestEpoch` kept the weights.
        history: of all epochs.
        workers, device: as in `loop.run`.

    Returns:
        As `evaluate`, and "epoch"; kept beside the run, and read from there when it is asked for
        again.
    """
    best = best_epoch(history)
    note = f"{directory}/{FINAL_FILE}"
    if storage.exists(note):
        return json.loads(storage.read_text(note))
    with tempfile.TemporaryDirectory() as local:
        _copy(_best(directory, best), local)
        model.load_state_dict(checkpoint.read_state(local)["model"])
    tasks = loop.selected_tasks(experiment)
    batches = eval_batches(
        split.streams,
        split.rows,
        tasks=[task.name for task in tasks],
        batch_size=max(1, experiment.batch_size // workers.size),
        workers=workers,
        dtype=loop.DTYPES[experiment.precision],
    )
    metrics = evaluate(
        model, batches, tasks, workers=workers, device=device, precision=experiment.precision
    )
    found = {"epoch": float(best), **metrics}
    if workers.rank == 0:
        storage.write_text(note, json.dumps(found, indent=2) + "\n")
    return found


def _best(directory: str, epoch: int) -> str:
    return f"{directory}/best-{epoch:05}"


def _uri(location: str) -> str:
    return location if "://" in location else Path(location).absolute().as_uri()


def _copy(source: str, destination: str) -> None:
    """Between folders here and in storage."""
    system, path = fs.FileSystem.from_uri(_uri(destination))
    system.create_dir(path, recursive=True)
    fs.copy_files(_uri(source), _uri(destination))
