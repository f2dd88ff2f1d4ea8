"""The commands that compare methods, whole and at small size: ablation and sensitivity.

Their real runs train in this process (`tests/helpers/local_mode.py`).
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray.cli.commands import ablation
from tests.helpers.benchmark_options import SMALL
from tests.helpers.commands import call
from tests.helpers.local_mode import study_here

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    study_here(monkeypatch)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


def rows_of(command: str, storage: Path, *more: Any) -> dict[str, Any]:
    """By method, the row of the table that a command left."""
    out = storage / command
    options = ["scenes", *SMALL, "--storage", storage, "--out", out, "--pictures", 0, *more]
    call(command, *options)
    (table,) = set(out.glob("*.csv")) - {out / "factors.csv"}
    assert (out / "report.html").exists()
    return {row["method"]: row for row in csv.DictReader(table.read_text().splitlines())}


@pytest.mark.slow
def test_the_ablation_trains_its_eight_cells_and_says_what_each_factor_is_worth(
    storage: Path,
) -> None:
    rows = rows_of("ablation", storage)
    delta = {name: float(row["delta_p_task"]) for name, row in rows.items() if name != "stl"}
    assert len(delta) == 8
    assert len(set(delta.values())) == 8, "two cells trained alike"
    with (storage / "ablation" / "factors.csv").open() as file:
        effects = {row["factor"]: row for row in csv.DictReader(file)}
    assert list(effects) == list(ablation.FACTORS)
    for factor, effect in effects.items():
        having = [value for name, value in delta.items() if f"+ {factor}" in name]
        others = [value for name, value in delta.items() if f"+ {factor}" not in name]
        assert len(having) == len(others) == 4
        expected = {
            "on average": sum(having) / 4 - sum(others) / 4,
            "alone": delta[f"EW + {factor}"] - delta["EW"],
        }
        for which, points in expected.items():
            assert float(effect[which]) == pytest.approx(points, abs=0.006)


@pytest.mark.slow  # it takes the single tasks of the one before
def test_a_sensitivity_study_trains_its_values_against_the_same_single_tasks(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("sensitivity", storage, "--vary", "csa", "--values", "0.1", "1.9")
    assert len({row["delta_p_task"] for row in rows.values()}) == 3
    printed = capsys.readouterr().out
    assert len(re.findall(r"^single-task \w+: from ", printed, re.MULTILINE)) == 2
