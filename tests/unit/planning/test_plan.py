"""The simulation of a search on a cluster: against arithmetic, against Ray's own ASHA, and what it
refuses; the times read from a search's timing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from repmtl_ray.cli.options import SCHEDULERS
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.planning.simulation import ClusterPlan, SearchPlan, SuccessiveHalving, simulate
from repmtl_ray.planning.timing import measure_epoch, read_search_timing
from repmtl_ray.search import schedulers
from tests.helpers.commands import call

PLAIN = SearchPlan(num_trials=10, epochs=5, epoch_s=60, trial_overhead_s=30)


def test_without_surprises_time_and_money_are_arithmetic() -> None:
    machines = ClusterPlan(
        max_machines=2, slots=2, start_s=300, idle_s=600, price=3.0, head_price=0.5
    )
    estimate = simulate(PLAIN, machines)
    trial_s = 5 * 60 + 30
    waves = 3  # 10 trials on 4 slots
    assert estimate.hours * 3600 == pytest.approx(300 + waves * trial_s)
    # The third wave's two trials are on one machine or one on each, by who is free first; both
    # machines were free at the same instant, and the first fills itself.
    paid = (300 + 3 * trial_s + 600) + (300 + 2 * trial_s + 600)
    assert estimate.machine_hours * 3600 == pytest.approx(paid)
    last = 300 + 3 * trial_s + 600
    assert estimate.cost == pytest.approx(3.0 * paid / 3600 + 0.5 * last / 3600)
    assert estimate.utilisation == pytest.approx(10 * trial_s / (2 * paid))
    assert estimate.epochs_trained == 50


def test_no_more_trials_run_at_once_than_there_are_slots() -> None:
    search = SearchPlan(num_trials=50, epochs=8, epoch_s=7, brackets=1)
    machines = ClusterPlan(max_machines=3, slots=2, interruptions=10.0, seed=3)
    estimate = simulate(search, machines)
    assert estimate.num_interrupted > 0
    starts, ends = estimate.trials.T
    at_once = [((starts <= start) & (start < ends)).sum() for start in starts]
    # A trial whose machine was taken away waits in between, so it counts twice over.
    assert max(at_once) <= 3 * 2 * 2
    assert estimate.peak_machines == 3


def test_trials_that_lost_their_machine_end_all_the_same_and_keep_their_epochs() -> None:
    search = SearchPlan(num_trials=20, epochs=10, epoch_s=60, trial_overhead_s=10)
    calm = simulate(search, ClusterPlan(max_machines=4, slots=1))
    rough = simulate(search, ClusterPlan(max_machines=4, slots=1, interruptions=2.0, seed=1))
    assert rough.num_interrupted > 0
    assert (rough.epochs == 10).all()
    assert rough.epochs_trained == calm.epochs_trained == 200
    assert rough.hours > calm.hours


def test_machines_go_when_trials_run_out() -> None:
    search = SearchPlan(num_trials=5, epochs=1, epoch_s=3600, trial_overhead_s=0)
    estimate = simulate(search, ClusterPlan(max_machines=4, slots=1, start_s=0, idle_s=60))
    stops = sorted(stop for _, stop in estimate.machines)
    assert stops[:3] == pytest.approx([1 + 1 / 60] * 3)
    assert stops[3] == pytest.approx(2 + 1 / 60)


def test_machines_that_must_stay_are_paid_to_the_end() -> None:
    search = SearchPlan(num_trials=5, epochs=1, epoch_s=3600, trial_overhead_s=0)
    machines = ClusterPlan(max_machines=4, min_machines=4, slots=1, start_s=0, idle_s=60)
    assert sorted(stop for _, stop in simulate(search, machines).machines) == pytest.approx(
        [2.0] * 3 + [2 + 1 / 60], abs=0.02
    )


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(("grace", "bracket"), [(1, 0), (2, 0), (1, 1), (1, 2)])
def test_halving_decides_as_rays_asha_does(factor: int, grace: int, bracket: int) -> None:
    from ray.tune.schedulers.async_hyperband import _Bracket

    draws = np.random.default_rng(factor)
    ours = SuccessiveHalving(
        grace_period=grace, max_epochs=17, reduction_factor=factor, bracket=bracket
    )
    theirs = _Bracket(grace, 17, factor, bracket)
    running = dict.fromkeys(range(30), 0)
    stopped = 0
    while running:
        trial = int(draws.choice(list(running)))
        running[trial] += 1
        metric = float(draws.standard_normal())
        passes = ours.should_continue(trial, running[trial], metric)
        decision = theirs.on_result(SimpleNamespace(trial_id=trial), running[trial], metric)
        assert passes == (decision == "CONTINUE")
        stopped += not passes
        if not passes or running[trial] == 16:
            del running[trial]
    assert 0 < stopped < 30


def test_early_stopping_saves_epochs_and_keeps_the_best() -> None:
    search = SearchPlan(num_trials=200, epochs=16, epoch_s=10, noise=0.3)
    machines = ClusterPlan(max_machines=8, slots=8)
    full = simulate(search, machines)
    early = simulate(SearchPlan(**{**vars(search), "brackets": 1}), machines)
    assert early.epochs_trained < 0.5 * full.epochs_trained
    assert early.num_stopped > 100
    best = np.argsort(np.random.default_rng(0).standard_normal(200))[-10:]  # the machines' seed
    assert early.epochs[best].mean() > 2 * early.epochs.mean()


def test_brackets_that_begin_later_stop_fewer_trials() -> None:
    """Of Hyperband, with the odds by which Ray Tune draws a trial's bracket."""
    search = SearchPlan(num_trials=300, epochs=27, epoch_s=10, reduction_factor=3, brackets=1)
    machines = ClusterPlan(max_machines=8, slots=8)
    one, four = (
        simulate(SearchPlan(**{**vars(search), "brackets": number}), machines) for number in (1, 4)
    )
    assert 0 < four.num_stopped < one.num_stopped
    assert (four.epochs < 3).sum() > 100, "most are in the first bracket"


def test_a_population_waits_for_its_slowest_run() -> None:
    """Eight runs of six epochs on three slots: three waves of every two epochs."""
    search = SearchPlan(num_trials=8, epochs=6, epoch_s=10, trial_overhead_s=5, interval=2)
    estimate = simulate(search, ClusterPlan(max_machines=1, slots=3, start_s=0, idle_s=0))
    assert (estimate.epochs == 6).all()
    assert estimate.num_stopped == 0
    assert estimate.hours * 3600 == pytest.approx(3 * (5 + 20) + 2 * 3 * 20)
    ends = np.sort(estimate.trials[:, 1]) * 3600
    np.testing.assert_allclose(ends, np.repeat([155, 175, 195], [3, 3, 2]))
    alone = simulate(
        SearchPlan(**{**vars(search), "interval": None}),
        ClusterPlan(max_machines=1, slots=8, start_s=0),
    )
    together = simulate(search, ClusterPlan(max_machines=1, slots=8, start_s=0))
    assert together.hours == pytest.approx(alone.hours), "with a slot for each, nobody waits"


def test_a_population_survives_interruptions() -> None:
    search = SearchPlan(num_trials=12, epochs=8, epoch_s=60, interval=1)
    machines = ClusterPlan(max_machines=3, slots=2, interruptions=5.0, seed=2, idle_s=1)
    estimate = simulate(search, machines)
    assert estimate.num_interrupted > 0
    assert (estimate.epochs == 8).all()
    assert estimate.epochs_trained == 96


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("none", 16, "no early stopping"),
        ("asha", 16, "ASHA"),
        ("hyperband", 16, "Hyperband with 3 brackets"),
        ("pbt", 16, "population based training, compared every 2 epochs"),
    ],
)
def test_every_scheduler_of_a_search_is_simulated(
    name: str, epochs: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call("plan", "--scheduler", name, "--epochs", epochs, "--epoch-seconds", 9, "--trials", 9)
    assert f"; {expected}\n" in capsys.readouterr().out


def test_the_command_offers_the_schedulers_of_a_search() -> None:
    assert SCHEDULERS == schedulers.NAMES


@pytest.mark.parametrize(
    ("search", "machines", "message"),
    [
        ({"num_trials": 0}, {}, "num_trials is 0; expected at least 1"),
        ({"epoch_s": 0}, {}, "epoch_s is 0; expected more than 0"),
        ({}, {"slots": 0}, "slots is 0"),
        ({}, {"price": -1}, "price is -1; expected at least 0"),
        ({}, {"min_machines": 3}, "min_machines is 3, max_machines 2"),
        ({"epoch_s": 9000}, {"interruptions": 1}, "hardly any would end"),
    ],
)
def test_impossible_plans_are_refused(
    search: dict[str, Any], machines: dict[str, Any], message: str
) -> None:
    plan = SearchPlan(**{**vars(PLAIN), **search})
    with pytest.raises(ValueError, match=message):
        simulate(plan, ClusterPlan(**{"max_machines": 2, "slots": 1, **machines}))


def write_trial(folder: Path, name: str, start: Any, reports: Any) -> None:
    trial = folder / "search" / name
    trial.mkdir(parents=True)
    lines = [
        json.dumps({"epoch": n + 1, "timestamp": at, "time_total_s": at - start})
        for n, at in enumerate(reports)
    ]
    (trial / "result.json").write_text("\n".join(lines) + "\n")


def test_the_times_of_a_search_are_read_from_its_record(tmp_path: Path) -> None:
    """Two slots; epochs of 10 s; 12 s before a trial's first epoch, and none between trials."""
    write_trial(tmp_path, "a", 1000, [1022, 1032, 1042])
    write_trial(tmp_path, "b", 1000, [1022])
    write_trial(tmp_path, "c", 1022, [1044, 1054, 1064])
    timing = read_search_timing(tmp_path)
    assert (timing.num_trials, timing.epochs, timing.num_stopped) == (3, 3, 1)
    assert timing.max_concurrent == 2
    assert timing.epochs_trained == 7
    assert timing.epoch_s == 10
    assert timing.overhead_s == pytest.approx(12)
    assert timing.hours * 3600 == pytest.approx(64)


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished search"):
        read_search_timing(tmp_path)


def test_the_command_prints_a_row_for_every_size_and_leaves_its_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trial(tmp_path / "small", "a", 1000, [1022, 1032, 1042])
    write_trial(tmp_path / "large", "a", 1000, [1022, 1032, 1042])
    write_trial(tmp_path / "large", "b", 1042, [1064, 1074, 1084])
    call(
        "plan",
        *("--calibrate", str(tmp_path / "small"), str(tmp_path / "large")),
        *("--trials", "9", "--epochs", "3", "--machines", "1", "3", "--price", "36"),
        *("--start-seconds", "0", "--idle-minutes", "0", "--out", str(tmp_path / "plan")),
    )
    printed = capsys.readouterr().out
    assert "times of small: epoch 10.00 s, trial 12.0 s more" in printed
    assert "large: 2 trials, 1 at once, measured 1.40 min" in printed
    assert "simulated 1.40 min" in printed
    rows = [line.split() for line in printed.splitlines() if line[:10].strip().isdigit()]
    # 9 trials of 42 s on one slot, and on three; 36 an hour is 1 for 100 s
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("1", "0.10", "3.78"),
        ("3", "0.04", "3.78"),
    ]
    assert (tmp_path / "plan" / "plan.png").stat().st_size > 10_000
    assert len((tmp_path / "plan" / "plan.csv").read_text().splitlines()) == 3


def test_photographs_are_not_measured() -> None:
    with pytest.raises(ValueError, match="office31: an epoch can only be measured on rendered"):
        measure_epoch(Experiment(data=DataConfig(name="office31", path="/nowhere")))
