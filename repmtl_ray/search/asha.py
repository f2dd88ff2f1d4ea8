"""ASHA that continues where it was: Ray Tune does not store schedulers.

Owns the file of rungs beside a search: what each run had at each milestone, and which runs were
stopped. Plain JSON, written whole whenever it changes, read when a resumed search adds its first
trial.
"""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from repmtl_ray import ray_compat, storage

logger = logging.getLogger(__name__)

RUNGS_FILE = "asha.json"


class ResumableASHA(ASHAScheduler):
    """Stops runs that fall behind at the same epoch, across interruptions of the search.

    It knows a run by its name, which stays when the search is resumed, and not by its trial's id.

    Args:
        location: path or URI of the file of rungs. If it exists, the search continues from it.
        options: of Ray Tune's ASHAScheduler.
    """

    def __init__(self, location: str, **options: Any) -> None:
        super().__init__(**options)
        self._location = location
        self._stopped: set[str] = set()
        self._is_read = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not self._is_read:
            self._is_read = True
            self._read()
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["run"].name
        if name in self._stopped:  # decided before the interruption
            return TrialScheduler.STOP
        before = self._rungs()
        decision = super().on_trial_result(tune_controller, _named(trial), result)
        if decision == TrialScheduler.STOP:
            self._stopped.add(name)
        if decision == TrialScheduler.STOP or self._rungs() != before:
            self._write()
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, _named(trial), result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_remove(tune_controller, _named(trial))

    def _rungs(self) -> dict[str, dict[str, float]]:
        """By milestone: each run's value."""
        rungs = ray_compat.asha_rungs(self)
        return {str(milestone): dict(values) for milestone, values in rungs}

    def _write(self) -> None:
        text = json.dumps({"rungs": self._rungs(), "stopped": sorted(self._stopped)}, indent=1)
        storage.write(self._location, text.encode())

    def _read(self) -> None:
        try:
            text = storage.read(self._location)
        except FileNotFoundError:
            return
        try:
            stored = json.loads(text)
            for milestone, values in ray_compat.asha_rungs(self):
                values.update(stored["rungs"].get(str(milestone), {}))
            self._stopped.update(stored["stopped"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._location} holds no rungs of ASHA ({error!r}); remove it, and early stopping starts anew."
            ) from error


def _named(trial: Any) -> Any:
    """All that ASHA reads of a trial, with the run's name for its id."""
    return SimpleNamespace(trial_id=trial.config["run"].name)
