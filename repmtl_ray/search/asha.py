"""ASHA and asynchronous Hyperband that continue where they were: Ray Tune does not store schedulers.

Owns the file of rungs beside a search: what each run had at each milestone, and which runs were
stopped. Plain JSON, written whole whenever it changes, read when a resumed search adds its first
trial.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import zlib
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
        name = trial.config["run"].name
        super().on_trial_add(tune_controller, _named(trial))
        # Ray Tune has drawn it from NumPy's global state, which a resumed search has not.
        self._trial_info[name] = self._brackets[self.bracket_of(name)]

    def bracket_of(self, name: str) -> int:
        """Which bracket a run is in: drawn from its name, an early bracket as often as it is large.

        A bracket has one rung less than the one before it and begins later; Ray Tune draws brackets
        with odds of e for every rung.
        """
        sizes = [len(rungs) for rungs in ray_compat.asha_rungs(self)]
        draw = zlib.crc32(f"bracket {name}".encode()) / 2**32
        odds = list(itertools.accumulate(math.exp(size) for size in sizes))
        return next(index for index, edge in enumerate(odds) if draw * odds[-1] < edge)

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
        """By milestone (of several brackets, "<bracket>: <milestone>"): each run's value."""
        return {label: dict(values) for label, values in self._labelled()}

    def _labelled(self) -> list[tuple[str, dict[str, float]]]:
        brackets = ray_compat.asha_rungs(self)
        return [
            (str(milestone) if len(brackets) == 1 else f"{index}: {milestone}", values)
            for index, rungs in enumerate(brackets)
            for milestone, values in rungs
        ]

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
            for label, values in self._labelled():
                values.update(stored["rungs"].get(label, {}))
            self._stopped.update(stored["stopped"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._location} holds no rungs of ASHA ({error!r}); remove it, and early stopping starts anew."
            ) from error


def _named(trial: Any) -> Any:
    """All that ASHA reads of a trial, with the run's name for its id."""
    return SimpleNamespace(trial_id=trial.config["run"].name)
