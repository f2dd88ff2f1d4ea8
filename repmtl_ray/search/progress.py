"""What a user sees while a search runs: a line when a trial ends, and a heartbeat of those that
run.

Owns printing during a search, nothing else.
"""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback

from repmtl_ray import cluster

HEARTBEAT_S = 15.0
SHORT_NAMES = {
    "policy.name": "policy",
    "policy.log_losses": "log_losses",
    "regularizer.lambda_tsr": "tsr",
    "regularizer.lambda_csa": "csa",
    "regularizer.temperature": "tau",
    "optimizer.learning_rate": "lr",
}


class Progress(Callback):
    """Prints one line a finished trial and, in between, one every `HEARTBEAT_S` seconds.

    Args:
        epochs: that a full trial takes.
        metric: shown with every finished trial; None shows none.
    """

    def __init__(self, epochs: int, metric: str | None) -> None:
        self.epochs = epochs
        self.metric = metric
        self.start = self.last_beat = time.monotonic()
        self.running: dict[str, int] = {}
        self.ended = 0
        self.best: float | None = None

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.setdefault(trial.trial_id, 0)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.running[trial.trial_id] = int(result.get("epoch", 0))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        epoch = int(result.get("epoch", 0))
        outcome = "done" if epoch >= self.epochs else f"stopped after epoch {epoch}"
        value = result.get(self.metric) if self.metric else None
        if value is not None:
            self.best = value if self.best is None else max(self.best, value)
            outcome += f"   {self.metric} {value:+.2f} %   best so far {self.best:+.2f} %"
        self._ended(trial, outcome)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "failed (the search goes on; the reason is in the table)")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if self.running and now - self.last_beat > HEARTBEAT_S:
            self.last_beat = now
            epochs = ", ".join(f"{epoch}/{self.epochs}" for epoch in self.running.values())
            waiting = cluster.waiting_for() if 0 in self.running.values() else ""
            self._print(f"running at epoch {epochs}" + (f"; {waiting}" if waiting else ""))

    def _ended(self, trial: Any, outcome: str) -> None:
        self.running.pop(trial.trial_id, None)
        self.ended += 1
        self.last_beat = time.monotonic()
        values = "  ".join(
            f"{SHORT_NAMES.get(key, key)} {_short(value)}" for key, value in trial.config.items()
        )
        self._print(f"trial {self.ended}  {values}   {outcome}")

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
