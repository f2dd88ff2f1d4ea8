"""The configurations that a search draws, each of them trained once.

Owns how a space becomes runs: by grids and random numbers, or by Optuna, which learns from the runs
that have ended. A configuration that was drawn before does not count as a draw: another one is drawn
in its place, until the space seems to have no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.tune.search.sample import Domain

from repmtl_ray import ray_compat, storage
from repmtl_ray.config import Experiment, digest, replace
from repmtl_ray.delta import directions
from repmtl_ray.report.runs import gains_by_task
from repmtl_ray.search.progress import label_of
from repmtl_ray.search.run_records import METRIC, Record, Run
from repmtl_ray.search.space import choices_of, complete, flatten, problem_of, whole_paths

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task

DRAWN_FILE = "drawn.json"
MAX_IN_VAIN = {"random": 500, "optuna": 100}
"""So many draws in a row that were drawn before end a search: its space has no other configuration,
or hardly one."""
REFUSED = "refused"
"""Begins the name of a configuration that is no experiment, and is the folder that has the reasons."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A configuration that a search drew.

    Args:
        number: from 1, in the order of the draws.
        changes: of the search's experiment, by dotted path.
        run: that trains it; None if it is refused.
        error: why it is refused.
        row: what the user calls it, of a row that is trained besides the draws.
    """

    number: int
    changes: Mapping[str, Any]
    run: Run | None
    error: str = ""
    row: str = ""

    @property
    def name(self) -> str:
        return self.run.name if self.run is not None else f"{REFUSED}-{self.number}"


class Draws:
    """All configurations that a search has drawn, each of them once.

    Args:
        experiment: of the search.
        known: as in `selected_tasks`.
        directory: of the search, where refused configurations are kept for its report; None keeps none.
    """

    def __init__(
        self,
        experiment: Experiment,
        known: tuple[Task, ...] | None = None,
        directory: str | None = None,
    ) -> None:
        self.experiment = experiment
        self.known = known
        self.directory = directory
        self.draws: list[Draw] = []
        self._by_key: dict[str, Draw] = {}

    def add(self, changes: Mapping[str, Any], row: str = "") -> tuple[Draw, bool]:
        """The draw of a configuration, and whether it is new; `row` as in `Draw`."""
        text = key = json.dumps(changes, sort_keys=True, default=str)
        if text in self._by_key:  # digests take long, and a small space is drawn from often
            return self._by_key[text], False
        error, run = problem_of(self.experiment, changes, self.known), None
        if not error:
            experiment = replace(self.experiment, changes)
            key = digest(experiment)
            run = Run(name=key, label=row or label_of(changes), experiment=experiment)
        draw = self._by_key.get(key)
        is_new = draw is None
        if draw is None:
            number = len(self.draws) + 1
            draw = Draw(number=number, changes=changes, run=run, error=error, row=row)
            self.draws.append(draw)
            if error and self.directory is not None:
                values = {"changes": dict(changes), "row": row, "reason": error}
                # Named by its content: a search that is continued may count its draws otherwise.
                name = hashlib.sha256(text.encode()).hexdigest()[:12]
                storage.write(
                    f"{self.directory}/{REFUSED}/{name}.json",
                    (json.dumps(values, default=str) + "\n").encode(),
                )
        self._by_key[key] = self._by_key[text] = draw
        return draw, is_new

    def say_exhausted(self, num_samples: int) -> None:
        """Tells the user why there are fewer configurations than samples."""
        print(
            f"the space has no further configuration: {len(self.draws)} are all that "
            f"{num_samples} samples of it gave",
            flush=True,
        )

    @property
    def runs(self) -> list[Run]:
        return [draw.run for draw in self.draws if draw.run is not None]


def draw_at_random(
    draws: Draws,
    param_space: Mapping[str, Any],
    references: Sequence[Mapping[str, Any]],
    num_samples: int,
) -> None:
    """Draws the references, then at random, each with every combination of the grids, as Ray Tune's
    BasicVariantGenerator does. A larger `num_samples` only adds to the end.

    Args:
        draws: filled here; its experiment has the seed.
        param_space, references, num_samples: as for `tune`. A sample that gives nothing new does not
            count.
    """
    whole = whole_paths(param_space)
    is_random = any(isinstance(value, Domain) for value in flatten(param_space).values())
    max_in_vain = MAX_IN_VAIN["random"] if is_random else len(references) + 1
    num_drawn = num_in_vain = 0
    points = [dict(reference) for reference in references]
    samples = ray_compat.drawn_samples(dict(param_space), points, draws.experiment.seed)
    while num_drawn < num_samples:
        added = [draws.add(flatten(variant, whole=whole)) for variant in next(samples)]
        if any(is_new for _, is_new in added):
            num_drawn, num_in_vain = num_drawn + 1, 0
            continue
        num_in_vain += 1
        if num_in_vain == max_in_vain:
            draws.say_exhausted(num_samples)
            return


Objectives = Callable[[Mapping[str, Any]], "list[float] | None"]
"""From the metrics of an epoch what is maximised; None if they do not say it."""


def delta_p_objective(metrics: Mapping[str, Any]) -> list[float] | None:
    """delta_p over the tasks alone."""
    value = metrics.get(METRIC)
    return None if value is None else [float(value)]


def task_objectives(baseline: Mapping[str, float]) -> Objectives:
    """The gain of every task over its single-task metrics, each an objective of its own."""
    names = directions(baseline)

    def gains(metrics: Mapping[str, Any]) -> list[float] | None:
        if not all(name in metrics for name in names):
            return None
        return list(gains_by_task({name: metrics[name] for name in names}, baseline).values())

    return gains


class OptunaRuns:
    """The source of a search by Optuna, which learns from every run that ends.

    It continues an earlier attempt: Optuna hears of runs that have a record, and the others are
    trained first.

    Args:
        param_space, references, num_samples: as for `tune`.
        draws: of the search, filled here.
        directory: of the search, whose `DRAWN_FILE` has the draws of earlier attempts.
        read: the record of a run, if it has one.
        objectives: what is maximised.
        num_objectives: how many values that gives; with several, Optuna looks for their Pareto front.
    """

    def __init__(
        self,
        param_space: Mapping[str, Any],
        references: Sequence[Mapping[str, Any]],
        num_samples: int,
        *,
        draws: Draws,
        directory: str,
        read: Callable[[Run], Record | None],
        objectives: Objectives = delta_p_objective,
        num_objectives: int = 1,
    ) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        space = flatten(param_space)
        self._domains = {p: domain for p, domain in space.items() if isinstance(domain, Domain)}
        self._constants = {p: value for p, value in space.items() if p not in self._domains}
        self._distributions = OptunaSearch.convert_search_space(dict(self._domains))
        self._draws, self._objectives = draws, objectives
        self._location = f"{directory}/{DRAWN_FILE}"
        self._drawn: list[dict[str, Any]] = []
        if storage.exists(self._location):
            stored = json.loads(storage.read(self._location))
            self._drawn = [self._parameters_of(values) for values in stored]
        self._num_samples, self._num_left = num_samples, num_samples - len(self._drawn)
        seed = draws.experiment.seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            # Another seed for every attempt, because the first one's numbers would be drawn once more.
            sampler=optuna.samplers.TPESampler(seed=seed + len(self._drawn)),
            pruner=optuna.pruners.NopPruner(),
            directions=["maximize"] * num_objectives,
        )
        for reference in references[len(self._drawn) :]:
            point = complete(flatten(reference), param_space, seed)
            self.study.enqueue_trial({path: point[path] for path in self._domains})
        self._objectives_of: dict[str, list[float] | None] = {}
        self._trials: dict[str, list[Any]] = {}
        self._unfinished: dict[str, dict[str, Any]] = {}
        self._again: list[Run] = []
        for parameters in self._drawn:
            draw, is_new = draws.add(self._constants | parameters)
            if not is_new or draw.run is None:
                continue
            self._unfinished[draw.run.name] = parameters
            record = read(draw.run)
            if record is None:
                self._again.append(draw.run)
            else:
                self.tell(draw.run, record["history"][-1])

    def next_run(self) -> Run | None:
        if self._again:
            return self._again.pop(0)
        num_in_vain = 0
        while self._num_left > 0:
            trial = self.study.ask(fixed_distributions=self._distributions)
            draw, is_new = self._draws.add(self._constants | trial.params)
            self._trials.setdefault(draw.name, []).append(trial)
            if is_new:
                num_in_vain = 0
                self._num_left -= 1
                self._drawn.append(dict(trial.params))
                storage.write(self._location, json.dumps(self._drawn, indent=1).encode())
                if draw.run is not None:
                    return draw.run
            if draw.run is None or draw.name in self._objectives_of:
                self._complete(draw.name)
            num_in_vain += not is_new
            if num_in_vain == MAX_IN_VAIN["optuna"]:
                self._num_left = 0
                self._draws.say_exhausted(self._num_samples)
        return None

    def tell(self, run: Run, metrics: Mapping[str, Any] | None) -> None:
        values = None if metrics is None else self._objectives(metrics)
        self._objectives_of[run.name] = values
        parameters = self._unfinished.pop(run.name, None)
        if parameters is not None and values is not None:  # of an earlier attempt
            from optuna.trial import create_trial

            self.study.add_trial(
                create_trial(params=parameters, distributions=self._distributions, values=values)
            )
        self._complete(run.name)

    def _complete(self, name: str) -> None:
        """Tells Optuna how all its proposals of a configuration ended."""
        from optuna.trial import TrialState

        values = self._objectives_of.get(name)
        for trial in self._trials.pop(name, []):
            if values is None:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.study.tell(trial, values)

    def _parameters_of(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Stored values as the space has them: JSON knows no tuples."""
        return {
            path: next(
                (known for known in choices_of(self._domains[path]) if _equal(known, value)), value
            )
            for path, value in stored.items()
        }


def _equal(one: Any, other: Any) -> bool:
    return json.dumps(one, default=str) == json.dumps(other, default=str)
