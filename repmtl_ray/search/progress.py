"""The lines that a search or a benchmark prints while it runs.

Owns printing, nothing else. One `Progress` serves the single-task baselines and the trials after
them, so that the clock and the numbers of the runs go on from one to the other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.tune import Callback

from repmtl_ray import cluster, placement_group_cleanup, ray_compat
from repmtl_ray.runs.worker_loss import note_loss

HEARTBEAT_S = 15.0
SHORT_NAMES = {
    "policy.name": "policy",
    "policy.log_losses": "log_losses",
    "regularizer.lambda_tsr": "tsr",
    "regularizer.lambda_csa": "csa",
    "regularizer.temperature": "tau",
    "regularizer.share": "share",
    "optimizer.learning_rate": "lr",
}


class Progress(Callback):
    """Prints one line per finished run and, in between, one line every `HEARTBEAT_S` seconds.

    Args:
        epochs: of a run that is not stopped early.
        metric: shown with every finished run that reports it; larger is better. None shows none.
    """

    def __init__(self, epochs: int, metric: str | None) -> None:
        self.epochs = epochs
        self.metric = metric
        self.start = self.last_beat = time.monotonic()
        self.epoch_of_running: dict[str, int] = {}
        self.num_finished = 0
        self.best: float | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.epoch_of_running.setdefault(trial.trial_id, 0)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.epoch_of_running[trial.trial_id] = int(result.get("epoch", 0))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        if "error" in result:
            self.on_trial_error(iteration, trials, trial)
            return
        epoch = int(result.get("epoch", 0))
        outcome = "done" if epoch >= self.epochs else f"stopped after epoch {epoch}"
        value = result.get(self.metric) if self.metric else None
        if value is not None:
            self.best = value if self.best is None else max(self.best, value)
            outcome += f"   {self.metric} {value:+.2f} %   best so far {self.best:+.2f} %"
        self._print_finished(trial, outcome)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._print_finished(trial, "failed (the others continue; the table has the reason)")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if self.epoch_of_running and now - self.last_beat > HEARTBEAT_S:
            self.last_beat = now
            epochs = ", ".join(f"{epoch}/{self.epochs}" for epoch in self.epoch_of_running.values())
            waiting = cluster.waiting_for() if 0 in self.epoch_of_running.values() else ""
            parts = (f"running at epoch {epochs}", cluster.data_actors(), waiting)
            self._print("; ".join(part for part in parts if part))

    def _print_finished(self, trial: Any, outcome: str) -> None:
        self.epoch_of_running.pop(trial.trial_id, None)
        self.num_finished += 1
        self.last_beat = time.monotonic()
        self._print(f"run {self.num_finished}  {trial.config['run'].label}   {outcome}")

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


def label_of(changes: Mapping[str, Any]) -> str:
    """A configuration in one line: what differs from the search's experiment, by path."""
    return "  ".join(
        f"{SHORT_NAMES.get(path, path)} {_short(value)}" for path, value in changes.items()
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Cleanup(Callback):
    """Removes the placement groups of dead runs every `EVERY_S` seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.time() >= self._next:
            placement_group_cleanup.remove_orphaned_groups()
            self._next = time.time() + placement_group_cleanup.EVERY_S


class NoteTrialLosses(Callback):
    """Notes the losses of runs that train in their trial's process.

    Args:
        folder: that has the runs' folders.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if ray_compat.trial_lost_its_process(trial):
            folder = f"{self._folder}/runs/{trial.config['run'].name}"
            note_loss(folder, trial.run_metadata.num_failures, [0])
