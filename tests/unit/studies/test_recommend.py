"""Which method for this problem: the runs go on, the budget ends them, and the words fit the numbers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray.studies import method_runs, recommend, verdict
from repmtl_ray.studies.rep_mtl import Row, compare, read_rows
from tests.helpers.problems import own_experiment, shop_model, shop_split
from tests.helpers.training import small_experiment

NAMES = ("EW", recommend.TUNED, "FairGrad", recommend.BOUNDED)


def compared(file: Path, **changes: Any) -> recommend.Recommendation:
    experiment = own_experiment(epochs=1)
    splits = {
        "train": shop_split(range(80)),
        experiment.data.eval_split: shop_split(range(80, 120)),
    }
    options: dict[str, Any] = {"minutes": 60, "seeds": (0, 1, 2), "names": NAMES, "draws": 2}
    options |= {"rates": (1.0,), "report": lambda line: None, **changes}
    return recommend.compare_methods(experiment, splits, file=file, **options)


def test_a_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    trained: list[str] = []
    original = method_runs.train_row

    def counted(variant: str, *arguments: Any, **named: Any) -> Row:
        trained.append(variant)
        return original(variant, *arguments, **named)

    monkeypatch.setattr(method_runs, "train_row", counted)
    first = compared(file, seeds=(0,))
    assert [row.variant for row in first.rows] == list(NAMES)
    assert len(trained) == len(NAMES) + 2  # two weights were tried
    assert first.chosen[recommend.TUNED]["policy.name"] == "Constant"
    assert "Nothing may be concluded on" in first.conclusions[0]
    whole = compared(file)
    assert len(trained) == 3 * len(NAMES) + 2
    assert whole.rows[: len(NAMES)] == first.rows
    again = compared(file)
    assert len(trained) == 3 * len(NAMES) + 2
    assert again == whole
    assert whole.failures == {}
    (pair,) = verdict.conflict_table(whole.rows)[1:]
    assert pair[0] == "click ~ buy"
    assert -1 <= float(pair[1]) <= 1
    spent = sum(row.seconds for row in read_rows(file))
    fewer = compared(file, minutes=spent / 60, seeds=(0, 1, 2, 3))
    assert fewer.rows == whole.rows
    assert "budget" not in str(fewer)


def test_learning_rates_are_tried_without_a_part_of_the_training_rows(tmp_path: Path) -> None:
    found = compared(tmp_path / "rows.jsonl", names=("EW", "UW"), rates=(1.0, 1e-9), seeds=(0,))
    assert set(found.chosen) == {"EW", "UW"}
    rates = {changes.get("optimizer.learning_rate", 0.05) for changes in found.chosen.values()}
    assert rates <= {0.05, 5e-11}


def test_what_cannot_be_trained_here_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    found = compared(tmp_path / "rows.jsonl", names=("EW", "Auto-Lambda"), seeds=(0,))
    assert list(found.failures) == ["Auto-Lambda"]
    assert "holdout" in found.failures["Auto-Lambda"]
    assert [row.variant for row in found.rows] == ["EW"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "minutes is 0"),
        ({"minutes": 1e-12, "seeds": (7,), "draws": 0}, "draws 0"),
        ({"names": ("UW",)}, "expected 'EW' among them"),
        ({"names": ("EW", "ew2")}, "policy.name is 'ew2', which is no policy"),
        ({"rates": (-1.0,)}, r"rates \[-1.0\]"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(tmp_path / "rows.jsonl", **changes)
    assert not (tmp_path / "rows.jsonl").exists()


def rows_of(name: str, values: list[float]) -> list[Row]:
    return [
        Row(
            variant=name,
            seed=seed,
            experiment="",
            metrics={"a/accuracy": value},
            diagnostics={},
            seconds=1.0,
        )
        for seed, value in enumerate(values)
    ]


def test_sentences_follow_the_adjusted_tests() -> None:
    rows = rows_of("EW", [50.0, 51.0, 49.0])
    rows += rows_of("good", [60.0, 61.1, 59.0]) + rows_of("bad", [40.0, 41.1, 39.0])
    rows += rows_of("same", [50.5, 50.8, 49.1]) + rows_of("short", [70.0])
    raw = {}
    for name in ("good", "bad", "same"):
        found = compare(rows, name, "EW", baseline="EW")
        assert found is not None
        raw[name] = found.p_value or 0.0
    order = sorted(raw, key=lambda name: raw[name])
    times = [(3 - rank) * raw[name] for rank, name in enumerate(order)]
    first = {name: max(times[: rank + 1]) for rank, name in enumerate(order)}
    table = {line[0]: line for line in verdict.comparison_table(rows)}
    for name in order[:2]:
        assert float(table[name][5]) == pytest.approx(first[name], rel=0.05)
    assert table["EW"][3:6] == ["", "", ""]
    text = verdict.conclusions(rows)
    assert text[0].startswith("Nothing may be concluded on short")
    assert text[1].startswith("Better than EW: good (+")
    assert text[2].startswith("Worse than EW: bad (-")
    assert text[3].startswith("No difference from EW was found for same")


def test_processes_are_for_data_that_have_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes is 2; expected at least 1, and 1 for data and"):
        recommend.recommend(own_experiment(epochs=1), model=shop_model, processes=2)
    with pytest.raises(ValueError, match="processes is 0; expected at least 1"):
        recommend.recommend(small_experiment(), processes=0)


@pytest.mark.slow  # two more processes load torch
@pytest.mark.usefixtures("scenes_cache")
def test_two_processes_find_what_one_finds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"names": ("EW", "UW"), "rates": (1.0, 0.1), "seeds": (0, 1)}
    options["report"] = lambda line: None
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as each of two processes has
    try:
        one = recommend.recommend(small_experiment(), directory=tmp_path / "one", **options)
    finally:
        torch.set_num_threads(threads)
    two = recommend.recommend(
        small_experiment(), directory=tmp_path / "two", processes=2, **options
    )
    assert [timeless(row) for row in two.rows] == [timeless(row) for row in one.rows]
    assert two.chosen == one.chosen
    # A line for each of four candidates and four runs, from the processes that trained them.
    assert capfd.readouterr().out.count(" s\n") == len(read_rows(two.file)) == 8


def timeless(row: Row) -> Row:
    return dataclasses.replace(row, seconds=0.0)
