"""Population based training: weak runs go on with the weights of strong ones, and changed coefficients.

Owns Ray Tune's scheduler made one that can be repeated and resumed. Which runs are weak or strong, and
how values change, is Ray Tune's; what may change is in `mutations.py`. All runs wait for each other
every few epochs, so no decision depends on which was faster. The decisions lie in a file beside the
search; the weights are copied by `runs/takeover.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Float

from repmtl_ray import storage
from repmtl_ray.config import Experiment
from repmtl_ray.search.progress import label_of
from repmtl_ray.search.run_records import Run
from repmtl_ray.search.schedulers import interval_of
from repmtl_ray.search.space import problem_of

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

POPULATION_FILE = "pbt.json"
_LOGS = {
    "ray.tune.schedulers.pbt": logging.WARNING,  # says what this prints
    "ray.tune.logger.logger": logging.ERROR,  # misses files that a paused trial has not had yet
    "ray.tune.utils.util": logging.ERROR,  # finds the copies slow, for which all trials wait
}

Schedule = list[dict[str, Any]]
"""Which run trained the weights with which values: "first_epoch" (from 1), "run" (a name), "values"
(by dotted path), in order."""


class Population(BasicVariantGenerator):
    """Hands out the runs of a population.

    It is not finished before they are: Ray Tune keeps the processes of paused trials for others only
    while it expects some.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_unfinished = 0

    def next_trial(self) -> Trial | None:
        trial = super().next_trial()
        self._num_unfinished += trial is not None
        return trial

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        super().on_trial_complete(trial_id, result, error)
        self._num_unfinished -= 1

    def is_finished(self) -> bool:
        return bool(super().is_finished()) and self._num_unfinished == 0


class ResumablePBT(PopulationBasedTraining):
    """Ray Tune's synchronous population based training, whose decisions are stored.

    They depend on the seed, the epoch and the runs' metrics alone: an interrupted search goes on as if
    it had never stopped.

    Args:
        directory: of the search, path or URI.
        runs: the whole population, with those that have ended.
        changes: of `mutations.mutations`.
        experiment: that is searched; its epochs and its seed.
        known: as in `selected_tasks`.
    """

    def __init__(
        self,
        directory: str,
        runs: Sequence[Run],
        changes: Mapping[str, Any],
        experiment: Experiment,
        known: tuple[Task, ...] | None = None,
    ) -> None:
        self._directory, self._seed, self._known = directory, experiment.seed, known
        self._interval = interval_of(experiment.epochs)
        self._changes, self._paths = dict(changes), tuple(changes)
        self._runs = {run.name: run for run in runs}
        self._name_of: dict[str, str] = {}
        self._takeovers = read_takeovers(directory)
        self._compared = max((taken["epoch"] for taken in self._takeovers), default=0)
        super().__init__(
            time_attr="epoch",
            perturbation_interval=self._interval,
            burn_in_period=self._compared + self._interval,
            hyperparam_mutations=self._changes,
            custom_explore_fn=self._allowed,
            log_config=False,  # the file has it
            synch=True,
        )
        for name, level in _LOGS.items():
            logging.getLogger(name).setLevel(level)
        self._take_over()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        run = self._now(trial.config["run"].name)
        self._name_of[trial.trial_id] = run.name
        values = run.facts["schedule"][-1]["values"]
        trial.set_config({"run": run, **values})
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        epoch = int(result["epoch"])
        if epoch <= self._compared or epoch % self._interval:  # also of a run that was interrupted
            return TrialScheduler.CONTINUE
        with _drawing(f"population {self._seed} {epoch}"):
            decision = super().on_trial_result(tune_controller, trial, result)
        self._note_takeovers(tune_controller.get_trials(), epoch)
        return decision

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        live = tune_controller.get_live_trials()
        if live and all(trial.status == Trial.PAUSED for trial in live):
            chosen = super().choose_trial_to_run(tune_controller)
            if chosen is not None:
                return chosen
            # They wait for one that has failed: Ray Tune compares when a trial reports.
            waiting = next(iter(live))
            self.on_trial_result(tune_controller, waiting, waiting.last_result)
        return super().choose_trial_to_run(tune_controller)

    def _now(self, name: str) -> Run:
        """A run with what it trains now, and the schedule for its record."""
        run = self._runs[name]
        schedule = schedules(self._runs, self._paths, self._takeovers)[name]
        changes = schedule[-1]["values"] if len(schedule) > 1 else {}
        return dataclasses.replace(run, changes=changes, facts={**run.facts, "schedule": schedule})

    def _allowed(self, config: dict[str, Any]) -> dict[str, Any]:
        """Changed values inside their ranges; those of the strong run where they are no experiment."""
        for path, domain in self._changes.items():
            if isinstance(domain, Float):
                config[path] = min(max(config[path], domain.lower), domain.upper)
        run: Run = config["run"]
        if problem_of(run.experiment, {path: config[path] for path in self._paths}, self._known):
            config.update(run.facts["schedule"][-1]["values"])
        return config

    def _note_takeovers(self, trials: Sequence[Any], epoch: int) -> None:
        """Makes what Ray Tune has decided durable, then does it: its copy of a trial's configuration
        has the other run in it."""
        taking = {
            self._name_of[trial.trial_id]: trial
            for trial in trials
            if trial.config["run"].name != self._name_of[trial.trial_id]
        }
        if not taking:
            return
        from repmtl_ray.runs.takeover import state_digest

        new = []
        for name, trial in taking.items():
            source = trial.config["run"].name
            new.append(
                {
                    "epoch": epoch,
                    "run": name,
                    "from": source,
                    "values": {path: trial.config[path] for path in self._paths},
                    "state": state_digest(self._folder(source))[1],
                }
            )
        self._takeovers, self._compared = [*self._takeovers, *new], epoch
        text = json.dumps(self._takeovers, indent=1) + "\n"
        storage.write(f"{self._directory}/{POPULATION_FILE}", text.encode())
        self._take_over()
        for taken in new:
            run, source = self._runs[taken["run"]], self._runs[taken["from"]]
            trial = taking[run.name]
            trial.set_config({"run": self._now(run.name), **taken["values"]})
            print(
                f"after epoch {epoch} the run ({run.label}) goes on with the weights of ({source.label}), "
                f"now {label_of(taken['values'])}",
                flush=True,
            )

    def _take_over(self) -> None:
        """Copies the weights of the last decisions, where that is not done yet."""
        from repmtl_ray.runs.takeover import state_digest, take_over

        for taken in self._takeovers:
            name = taken["run"]
            if taken["epoch"] < self._compared or name not in self._runs:
                continue
            num_epochs, digest = state_digest(self._folder(name))
            if num_epochs > taken["epoch"] or (num_epochs, digest) == (
                taken["epoch"],
                taken["state"],
            ):
                continue
            take_over(
                self._folder(taken["from"]),
                self._folder(name),
                self._now(name).trained,
                epoch=taken["epoch"],
                may_change=self._paths,
            )

    def _folder(self, name: str) -> str:
        return f"{self._directory}/runs/{name}"


def read_takeovers(directory: str) -> list[dict[str, Any]]:
    """Which run of a search took which other's weights over, in order; none before the first.

    Raises:
        ValueError: the file is damaged.
    """
    location = f"{directory}/{POPULATION_FILE}"
    try:
        found = json.loads(storage.read(location))
        return [
            {key: taken[key] for key in ("epoch", "run", "from", "values", "state")}
            for taken in found
        ]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, storage.StorageError):
            raise
        raise ValueError(
            f"{location} does not hold the decisions of a population ({error!r}). Without them its runs "
            "cannot go on; give another name."
        ) from error


def schedules(
    runs: Mapping[str, Run], paths: Sequence[str], takeovers: Sequence[Mapping[str, Any]]
) -> dict[str, Schedule]:
    """By run, the history of the weights that it has now.

    Args:
        runs: the population, by name.
        paths: of what changes.
        takeovers: of `read_takeovers`.
    """
    from repmtl_ray.runs.takeover import value_at

    found: dict[str, Schedule] = {}
    for name, run in runs.items():
        values = {path: value_at(run.experiment, path) for path in paths}
        found[name] = [{"first_epoch": 1, "run": name, "values": values}]
    for taken in takeovers:
        entry = {
            "first_epoch": taken["epoch"] + 1,
            "run": taken["run"],
            "values": dict(taken["values"]),
        }
        found[taken["run"]] = [*found[taken["from"]], entry]
    return found


@contextlib.contextmanager
def _drawing(what: str) -> Iterator[None]:
    """Random draws inside, of Python and of NumPy, depend on the text alone."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(what)
    np.random.seed(zlib.crc32(what.encode()))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
