"""ASHA that goes on where it was: Ray Tune stores searchers with a search, but not schedulers.

Owns the file of rungs beside a search: what each trial had at each milestone, and which trials were
stopped. Plain JSON, written whole whenever it changes, read when a restored search adds its first
trial.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from repmtl_ray import ray_compat, storage

logger = logging.getLogger(__name__)

RUNGS_FILE = "asha.json"


class ResumableASHA(ASHAScheduler):
    """Stops trials that fall behind at the same epoch, across interruptions of the search.

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
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id in self._stopped:  # decided before the interruption
            return TrialScheduler.STOP
        before = self._rungs()
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped.add(trial.trial_id)
        if decision == TrialScheduler.STOP or self._rungs() != before:
            self._write()
        return decision

    def _rungs(self) -> dict[str, dict[str, float]]:
        """By milestone: each trial's value."""
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
