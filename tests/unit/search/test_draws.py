"""Which configurations a search draws, and that none is trained twice."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from repmtl_ray.config import replace
from repmtl_ray.search.draws import (
    MAX_IN_VAIN,
    Draws,
    OptunaRuns,
    delta_p_objective,
    draw_at_random,
    task_objectives,
)
from repmtl_ray.search.run_records import METRIC, Record, Run
from tests.helpers.searches import BASE, BASELINE, CSA, POLICY, RATE, TSR

SPACE = {
    POLICY: ray_tune.choice(["EW", "UW", "GLS"]),
    TSR: ray_tune.uniform(0, 1),
    CSA: ray_tune.grid_search([0.1, 0.9]),
    RATE: 1e-3,
}
CHOICES = {POLICY: ray_tune.choice(["EW", "UW"]), TSR: ray_tune.choice([0.1, 0.9]), RATE: 1e-3}


def drawn(num_samples: int, references: tuple[dict[str, Any], ...] = ()) -> list[dict[str, Any]]:
    draws = Draws(replace(BASE, {"seed": 3}))
    draw_at_random(draws, SPACE, references, num_samples)
    return [dict(draw.changes) for draw in draws.draws]


@pytest.mark.parametrize("references", [(), ({POLICY: "EW"}, {TSR: 0.0, CSA: 0.1})])
def test_draws_are_those_of_ray_tune(references: tuple[dict[str, Any], ...]) -> None:
    ray_tune.register_trainable("trained by nobody", print)
    generator = BasicVariantGenerator(
        points_to_evaluate=[dict(reference) for reference in references], random_state=3
    )
    generator.add_configurations(
        {"x": {"run": "trained by nobody", "config": dict(SPACE), "num_samples": 4}}
    )
    expected = []
    while (trial := generator.next_trial()) is not None:
        expected.append(trial.config)
    assert drawn(4, references) == expected


def test_more_samples_are_added_at_the_end() -> None:
    assert drawn(5)[: len(drawn(3))] == drawn(3)


def test_a_configuration_that_is_drawn_again_is_the_same_draw() -> None:
    draws = Draws(BASE)
    for policy, tsr in (("EW", 0.5), ("UW", 0.5), ("EW", 0.5), ("UWW", 0.5), ("UWW", 0.5)):
        draws.add({POLICY: policy, TSR: tsr})
    assert [draw.number for draw in draws.draws] == [1, 2, 3]
    assert len(draws.runs) == 2
    assert draws.draws[2].error.startswith("policy.name is 'UWW'")


@pytest.mark.parametrize("seed", range(5))
def test_a_random_search_draws_every_choice_before_it_ends_with_fewer(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = Draws(replace(BASE, {"seed": seed}))
    draw_at_random(draws, CHOICES, (), 4)
    assert {(run.experiment.policy.name, run.experiment.regularizer.lambda_tsr) for run in draws.runs} == {
        ("EW", 0.1), ("EW", 0.9), ("UW", 0.1), ("UW", 0.9),
    }  # fmt: skip
    assert not capsys.readouterr().out
    more = Draws(replace(BASE, {"seed": seed}))
    draw_at_random(more, CHOICES, (), 9)
    assert [run.name for run in more.runs] == [run.name for run in draws.runs]
    assert capsys.readouterr().out == (
        "the space has no further configuration: 4 are all that 9 samples of it gave\n"
    )


def test_a_row_keeps_its_name_and_a_draw_of_the_same_configuration_is_that_row() -> None:
    draws = Draws(BASE)
    row, is_new = draws.add({TSR: 0.3}, "mine")
    assert is_new
    assert (row.row, row.run.label) == ("mine", "mine")
    assert draws.add({TSR: 0.3}) == (row, False)
    assert draws.add({TSR: 0.5})[0].row == ""


def test_a_grid_is_drawn_once() -> None:
    draws = Draws(BASE)
    draw_at_random(draws, {CSA: ray_tune.grid_search([0.1, 0.9])}, [{CSA: 0.9}], 5)
    assert [run.experiment.regularizer.lambda_csa for run in draws.runs] == [0.9, 0.1]


def study_of(source: OptunaRuns) -> Any:
    """Optuna's own."""
    return source.study


class Search:
    """A search by Optuna whose runs end with a value that only depends on their configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.trained: list[str] = []

    def source(self, num_samples: int, space: dict[str, Any]) -> tuple[OptunaRuns, Draws]:
        draws = Draws(BASE)
        source = OptunaRuns(
            space,
            [{POLICY: "EW", TSR: 0.1}],
            num_samples,
            draws=draws,
            directory=str(self.folder),
            read=lambda run: self.records.get(run.name),
        )
        return source, draws

    def end(self, source: OptunaRuns, run: Run) -> None:
        value = -abs(run.experiment.regularizer.lambda_tsr - 0.4)
        self.trained.append(run.name)
        self.records[run.name] = {"history": [{METRIC: value}]}
        source.tell(run, {METRIC: value})


def test_optuna_trains_every_configuration_once_and_stops_when_all_samples_are_drawn(
    tmp_path: Path,
) -> None:
    search = Search(tmp_path)
    source, draws = search.source(4, CHOICES)
    running: list[Run] = []
    for run in iter(source.next_run, None):
        running.append(run)
        if len(running) == 2:
            search.end(source, running.pop(0))
    for run in running:
        search.end(source, run)
    assert len(search.trained) == len(set(search.trained)) == len(draws.runs)
    assert 2 <= len(draws.runs) <= 4, "TPE may propose the same for long"
    assert len(study_of(source).trials) <= 4 + MAX_IN_VAIN["optuna"]
    assert all(trial.state.is_finished() for trial in study_of(source).trials)
    assert draws.draws[0].changes == {POLICY: "EW", TSR: 0.1, RATE: 1e-3}


def test_optuna_continues_with_what_was_drawn_and_adds_samples(tmp_path: Path) -> None:
    search = Search(tmp_path)
    space = {TSR: ray_tune.uniform(0, 1), POLICY: "EW"}
    source, _ = search.source(6, space)
    runs = list(itertools.islice(iter(source.next_run, None), 4))
    for run in runs[:2]:
        search.end(source, run)
    again, draws = search.source(8, space)
    rest = list(iter(again.next_run, None))
    assert [run.name for run in rest[:2]] == [run.name for run in runs[2:]], "unfinished ones first"
    assert len(draws.runs) == 8
    assert len({run.name for run in draws.runs}) == 8
    for run in rest:
        search.end(again, run)
    study = study_of(again)
    assert len(study.trials) == 8
    assert study.best_value == max(
        record["history"][0][METRIC] for record in search.records.values()
    )


def gains_of(run: Run) -> tuple[float, float]:
    """Made-up gains of two tasks that no value of lambda_tsr serves both."""
    tsr = run.experiment.regularizer.lambda_tsr
    return 10 - 20 * (tsr - 0.2) ** 2, 10 - 20 * (tsr - 0.8) ** 2


def test_optuna_looks_for_the_pareto_front_of_the_tasks_also_after_an_interruption(
    tmp_path: Path,
) -> None:
    space = {TSR: ray_tune.uniform(0, 1)}
    records: dict[str, Record] = {}

    def source(num_samples: int) -> OptunaRuns:
        return OptunaRuns(
            space,
            (),
            num_samples,
            draws=Draws(BASE),
            directory=str(tmp_path),
            read=lambda run: records.get(run.name),
            objectives=task_objectives(BASELINE),
            num_objectives=2,
        )

    def train(searched: OptunaRuns) -> None:
        for run in iter(searched.next_run, None):
            segmentation, depth = gains_of(run)
            metrics = {
                "segmentation/miou": 40.0 * (1 + segmentation / 100),
                "depth/abs_error": 0.05 * (1 - depth / 100),
                "depth/loss": 1.0,
            }
            records[run.name] = {"history": [metrics]}
            searched.tell(run, metrics)

    train(source(5))
    again = source(8)
    train(again)
    assert len(again.study.trials) == len(records) == 8
    for trial in again.study.trials:
        tsr = trial.params[TSR]
        assert trial.values == pytest.approx(
            [10 - 20 * (tsr - 0.2) ** 2, 10 - 20 * (tsr - 0.8) ** 2]
        )
    assert len(again.study.best_trials) > 1, "a front, not one best"


def test_objectives_need_the_metrics_of_every_task() -> None:
    assert task_objectives(BASELINE)({"segmentation/miou": 44.0}) is None
    assert delta_p_objective({METRIC: 1}) == [1.0]
    assert delta_p_objective({}) is None
