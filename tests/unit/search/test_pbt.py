"""Population based training without Ray's processes: what is refused, decided, stored and repeated."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

import search_spaces
from repmtl_ray import Placement, cluster, search
from repmtl_ray.config import Experiment, digest, replace
from repmtl_ray.runs import takeover
from repmtl_ray.search.mutations import mutations
from repmtl_ray.search.pbt import POPULATION_FILE, ResumablePBT, schedules
from repmtl_ray.search.run_records import METRIC, Run
from repmtl_ray.search.schedulers import interval_of
from tests.helpers.searches import BASE, CSA, LOGS, POLICY, RATE, TAU, TSR

SHARE, C = "regularizer.share", "policy.arguments.c"
LOG_RANGE = ray_tune.loguniform(1e-4, 1e-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"searcher": "optuna"}, "cannot be used with searcher 'optuna', which chooses values too"),
        ({"num_samples": 1}, "cannot be used with num_samples 1; a population has at least 2 runs"),
        ({"placement": Placement(num_workers=2)}, "cannot be used with 2 workers a trial"),
        ({"max_concurrent": 3}, "cannot be used with max_concurrent 3; all 4 runs take turns"),
        ({"experiment": replace(BASE, {"epochs": 1})}, "cannot be used with epochs 1"),
        ({"param_space": {TSR: 0.5}}, "has nothing to change: the search space has plain values"),
        (
            {"param_space": {TSR: LOG_RANGE, POLICY: ray_tune.choice(["EW", "UW"])}},
            "cannot change 'policy.name' in mid-run: the network, its data, the policy or the losses",
        ),
        (
            {"param_space": {"batch_size": ray_tune.randint(2, 9), TSR: 0.5}},
            "cannot change 'batch_size' in mid-run",
        ),
        ({"param_space": {"model.encoder": ray_tune.choice(["resnet18"])}}, "'model.encoder'"),
        ({"param_space": {LOGS: ray_tune.choice([True, False])}}, "'policy.log_losses'"),
        (
            {"param_space": {"seed": ray_tune.grid_search([0, 1]), RATE: LOG_RANGE}},
            "cannot change 'seed' in mid-run: runs take each other's weights over, so that none",
        ),
        (
            {"param_space": {POLICY: "CAGrad", "policy.arguments.update_weights_every": ray_tune.choice([1, 2])}},
            "'policy.arguments.update_weights_every' in mid-run: of the policy's arguments, only single",
        ),
        (
            {"param_space": {POLICY: "MGDA", "policy.arguments.momentum_of_weights": ray_tune.choice([0.0, 0.5])}},
            "with some of its values the policy remembers more than with others",
        ),
        (
            {"param_space": {TSR: ray_tune.sample_from(lambda _: 0.5)}},
            "cannot change 'regularizer.lambda_tsr', which the space draws by Function",
        ),
    ],
)  # fmt: skip
def test_what_a_population_cannot_do_is_found_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    usual = {"experiment": BASE, "param_space": {RATE: LOG_RANGE}, "num_samples": 4}
    with pytest.raises(ValueError, match=message):
        search.tune(**usual | arguments, scheduler="pbt")


def test_coefficients_rates_and_numbers_of_the_policy_may_change() -> None:
    grid, range_ = ray_tune.grid_search([0.9, 0.1]), ray_tune.uniform(0.1, 0.5)
    space = {
        "regularizer": {"lambda_tsr": grid, "share": ray_tune.choice([None, 0.1])},
        TAU: 0.5,
        POLICY: "CAGrad",
        C: range_,
        "policy.arguments.max_norm": ray_tune.choice([2, 1]),
    }
    assert mutations(BASE, space, 2) == {
        TSR: [0.1, 0.9],
        SHARE: [None, 0.1],
        C: range_,
        "policy.arguments.max_norm": [1, 2],
    }
    assert set(mutations(BASE, search_spaces.mid_run(), 2)) == {SHARE, TAU}


def test_a_population_is_compared_about_eight_times() -> None:
    assert [interval_of(epochs) for epochs in (2, 5, 16, 20, 200)] == [1, 1, 2, 2, 25]


EPOCHS, RATES = 6, (1e-4, 3e-4, 2e-3, 9e-3, 4e-2, 9e-2)
EXPERIMENT = replace(BASE, {"epochs": EPOCHS, CSA: 0.0})
SPACE = {RATE: LOG_RANGE, TSR: ray_tune.choice([0.1, 0.5, 0.9])}


def population() -> list[Run]:
    experiments = [replace(EXPERIMENT, {RATE: rate, TSR: 0.5}) for rate in RATES]
    return [Run(name=digest(e), label=f"run {n}", experiment=e) for n, e in enumerate(experiments)]


class StoppedHereError(Exception):
    """The search was stopped here."""


class Storage:
    """In place of checkpoints: the rates that a run's weights were trained with, by the run's name.

    Args:
        patch: replaces what copies checkpoints.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rates: dict[str, list[float]] = {run.name: [] for run in population()}
        self.copies_left = math.inf
        patch.setattr(takeover, "take_over", self.take_over)
        patch.setattr(takeover, "state_digest", self.state_digest)

    def state_digest(self, folder: str) -> tuple[int, str]:
        rates = self.rates[Path(folder).name]
        return len(rates), json.dumps(rates)

    def take_over(
        self,
        source: str,
        folder: str,
        wanted: Experiment,
        *,
        epoch: int,
        may_change: Collection[str],
    ) -> None:
        if self.copies_left == 0:
            raise StoppedHereError
        self.copies_left -= 1
        assert set(may_change) == {RATE, TSR}
        assert len(self.rates[Path(source).name]) == epoch
        self.rates[Path(folder).name] = list(self.rates[Path(source).name])

    def score(self, name: str) -> float:
        """Best where all rates are 3e-3."""
        return -math.fsum(abs(math.log(rate / 3e-3)) for rate in self.rates[name])


class FakeTrial:
    """All that the scheduler uses of a trial."""

    def __init__(self, run: Run) -> None:
        self.trial_id = f"trial-{run.name}"
        self.config: dict[str, Any] = {"run": run}
        self.status, self.last_result = Trial.PENDING, {}
        self.experiment_tag = self.checkpoint = ""
        self.evaluated_params: dict[str, Any] = {}
        self.temporary_state = SimpleNamespace(saving_to=None)
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(
                checkpoint_config=SimpleNamespace(num_to_keep=None), _latest_checkpoint_result=None
            )
        )
        self.has_reported = False

    @property
    def name(self) -> str:
        return self.trial_id.removeprefix("trial-")

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config


class FakeTune:
    """Trains a population, a few runs at a time, in an order drawn at random.

    Args:
        directory: of the search.
        stored: the weights.
        order: of the draws.
        fails: a run that fails in its third epoch, after all others have ended theirs.
    """

    search_alg = None

    def __init__(self, directory: Path, stored: Storage, order: int, fails: str = "") -> None:
        self.stored, self.random, self.fails = stored, random.Random(order), fails
        self.scheduler = ResumablePBT(
            str(directory), population(), mutations(EXPERIMENT, SPACE, 2), EXPERIMENT
        )
        self.scheduler.set_search_properties(METRIC, "max")
        self.trials = [FakeTrial(run) for run in population()]
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def get_live_trials(self) -> set[FakeTrial]:
        return {trial for trial in self.trials if not trial.is_finished()}

    def pause_trial(self, trial: FakeTrial, should_checkpoint: bool = True) -> None:
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial: FakeTrial, result: Any = None) -> str:
        trial.checkpoint = "a checkpoint"
        return trial.checkpoint

    def run(self, *, slots: int, num_reports: float = math.inf) -> None:
        """Trains to the end; raises `StoppedHereError` after so many reports."""
        while live := self.get_live_trials():
            running = [trial for trial in self.trials if trial.status == Trial.RUNNING]
            while len(running) < min(slots, len(live)):
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is None:
                    break
                chosen.status, chosen.has_reported = Trial.RUNNING, False
                running.append(chosen)
            assert running, "all runs wait for ever"
            if num_reports == 0:
                raise StoppedHereError
            num_reports -= 1
            others = [trial for trial in running if trial.name != self.fails]
            self.report(self.random.choice(others or running))

    def report(self, trial: FakeTrial) -> None:
        rates, run = self.stored.rates[trial.name], trial.config["run"]
        assert run.name == trial.name
        if trial.has_reported or not rates:  # a run that goes on repeats its last report
            rates.append(run.trained.optimizer.learning_rate)
        trial.has_reported = True
        if len(rates) == EPOCHS or (trial.name == self.fails and len(rates) == 3):
            trial.status = Trial.TERMINATED
            return
        result = {"epoch": len(rates), METRIC: self.stored.score(trial.name)}
        decision = self.scheduler.on_trial_result(self, trial, result)
        trial.last_result = result
        if decision == TrialScheduler.PAUSE:
            trial.checkpoint, trial.status = "a checkpoint", Trial.PAUSED


def taken_over(directory: Path) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = json.loads((directory / POPULATION_FILE).read_text())
    return taken


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """A search's folder, and the rates of its runs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        stored = Storage(patch)
        FakeTune(directory, stored, order=0).run(slots=2)
    return directory, stored.rates


def test_weak_runs_take_the_weights_of_strong_ones_over(undisturbed: Any) -> None:
    directory, rates = undisturbed
    taken = taken_over(directory)
    assert Counter(entry["epoch"] for entry in taken) == dict.fromkeys(range(1, EPOCHS), 2)
    first = {run.name: run.experiment.optimizer.learning_rate for run in population()}
    assert {first[entry["run"]] for entry in taken[:2]} == {1e-4, 9e-2}, "the weakest two of six"
    assert {first[entry["from"]] for entry in taken[:2]} <= {2e-3, 9e-3}
    found = schedules({run.name: run for run in population()}, (RATE, TSR), taken)
    for name, schedule in found.items():
        starts = [entry["first_epoch"] for entry in schedule]
        lengths = [
            end - start for start, end in zip(starts, [*starts[1:], EPOCHS + 1], strict=True)
        ]
        expected = [
            entry["values"][RATE]
            for entry, length in zip(schedule, lengths, strict=True)
            for _ in range(length)
        ]
        assert rates[name] == expected, "the schedule says with which rates each epoch was trained"
    values = [entry["values"] for entry in taken]
    assert all(1e-4 <= value[RATE] <= 1e-1 and value[TSR] in (0.1, 0.5, 0.9) for value in values)
    assert len({value[RATE] for value in values}) > 5


@pytest.mark.parametrize(("slots", "order"), [(1, 1), (2, 2), (6, 3)])
def test_neither_speed_nor_room_changes_a_population(
    slots: int, order: int, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(monkeypatch)
    random.seed(order)
    before = random.getstate()
    FakeTune(tmp_path, stored, order).run(slots=slots)
    assert stored.rates == undisturbed[1]
    assert random.getstate() == before, "the caller's random numbers are as they were"


@pytest.mark.parametrize("num_reports", [0, 3, 6, 7, 13, 20, 33])
def test_an_interrupted_population_goes_on_as_if_it_had_not_stopped(
    num_reports: int, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(monkeypatch)
    with pytest.raises(StoppedHereError):
        FakeTune(tmp_path, stored, order=4).run(slots=3, num_reports=num_reports)
    FakeTune(tmp_path, stored, order=5).run(slots=3)
    assert stored.rates == undisturbed[1]
    assert taken_over(tmp_path) == taken_over(undisturbed[0])


@pytest.mark.parametrize("num_copies", [0, 1, 3, 6])
def test_a_copy_that_was_interrupted_is_made_before_a_run_goes_on(
    num_copies: int, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(monkeypatch)
    stored.copies_left = num_copies
    with pytest.raises(StoppedHereError):
        FakeTune(tmp_path, stored, order=6).run(slots=2)
    stored.copies_left = math.inf
    FakeTune(tmp_path, stored, order=7).run(slots=2)
    assert stored.rates == undisturbed[1]


def test_a_population_goes_on_without_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Storage(monkeypatch)
    fails = population()[2].name
    FakeTune(tmp_path, stored, order=8, fails=fails).run(slots=6)
    lengths = [len(rates) for name, rates in stored.rates.items() if name != fails]
    assert lengths == [EPOCHS] * 5
    later = [entry for entry in taken_over(tmp_path) if entry["epoch"] >= 3]
    assert later
    assert all(fails not in (entry["run"], entry["from"]) for entry in later)


def test_changed_values_that_are_no_experiment_are_not_taken(tmp_path: Path) -> None:
    """A share without penalties is refused by `Experiment`."""
    space = {TSR: ray_tune.choice([0.0, 0.5]), SHARE: ray_tune.uniform(0.1, 0.2)}
    experiment = replace(EXPERIMENT, {TSR: 0.5, SHARE: 0.15})
    run = Run(name="a", label="a", experiment=experiment)
    made = ResumablePBT(str(tmp_path), [run], mutations(experiment, space, 2), experiment)
    trial = FakeTrial(run)
    made.set_search_properties(METRIC, "max")
    made.on_trial_add(SimpleNamespace(search_alg=None), trial)
    changed = made._allowed({**trial.config, TSR: 0.0, SHARE: 0.18})
    assert (changed[TSR], changed[SHARE]) == (0.5, 0.15)
    changed = made._allowed({**trial.config, SHARE: 0.24})
    assert (changed[TSR], changed[SHARE]) == (0.5, 0.2), "inside the range"


@pytest.mark.parametrize("text", ["", "{}x", '[{"epoch": 1}]', "3"])
def test_damaged_decisions_are_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / POPULATION_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"pbt.json does not hold the decisions of a population"):
        ResumablePBT(str(tmp_path), population(), mutations(EXPERIMENT, SPACE, 2), EXPERIMENT)
