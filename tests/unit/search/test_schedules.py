"""What the table, the files and the conclusion of a search say of runs that changed in mid-run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray.cli import results as cli_results
from repmtl_ray.config import from_dict, replace
from repmtl_ray.report.runs import conclusion, search_runs
from repmtl_ray.report.search_table import schedule_lines, search_text, seeds_text
from repmtl_ray.search import SearchResult
from tests.helpers.searches import (
    BASE,
    BASELINE,
    METRICS,
    POLICY,
    TSR,
    Outcome,
    metrics_of,
    search_result,
)


def entry(first_epoch: int, number: int, tsr: float) -> dict[str, Any]:
    return {"first_epoch": first_epoch, "run": f"run-{number}", "values": {TSR: tsr}}


WEAK = Outcome({TSR: 0.1}, metrics=metrics_of(3.0), schedule=[entry(1, 2, 0.5), entry(4, 1, 0.6)])
STRONG = Outcome({TSR: 0.5}, metrics=metrics_of(2.0), schedule=[entry(1, 2, 0.5)])
ROW = Outcome({POLICY: "EW", TSR: 0.0}, metrics=metrics_of(1.5), row="EW")
LINE = "rank 1: epochs 1-3 by rank 2 with lambda_tsr 0.5; epochs 4-10 with lambda_tsr 0.6"


def written(result: SearchResult, tmp_path: Path) -> Path:
    cli_results.write_results(result, tmp_path / "out", metrics=METRICS, title="scenes")
    return tmp_path / "out"


def test_the_table_says_which_run_trained_the_weights_with_what() -> None:
    table = search_result([WEAK, STRONG]).table
    assert table["lambda_tsr"].tolist() == [0.6, 0.5], "the last values"
    assert (table["digest"][0], table["digest"][1] != "") == ("", True)
    assert table["schedule"][0] == [
        {"first_epoch": 1, "rank": 2, "values": {TSR: 0.5}},
        {"first_epoch": 4, "rank": 1, "values": {TSR: 0.6}},
    ]
    assert schedule_lines(table) == [LINE]
    assert search_text(table, BASELINE, METRICS).endswith(LINE)
    assert f"- {LINE}" in search_text(table, BASELINE, METRICS, markdown=True)


def test_a_search_without_a_population_has_no_schedules() -> None:
    result = search_result([ROW])
    assert "schedule" not in result.table
    assert schedule_lines(result.table) == []
    assert result.notes == ()


def test_a_result_of_a_schedule_is_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search_result([WEAK, STRONG])
    assert result.best is None
    assert LINE in str(result)
    out = written(result, tmp_path)
    assert not (out / "best.json").exists()
    best = json.loads((out / "best_schedule.json").read_text())
    assert [part["first_epoch"] for part in best["schedule"]] == [1, 4]
    assert best["checkpoint"] == "/runs/3.0"
    assert best["experiment"]["epochs"] == BASE.epochs
    assert "No single configuration repeats this result" in best["note"]
    printed = capsys.readouterr().out
    assert "a schedule of coefficients, which no single configuration repeats" in printed
    assert "run it again" not in printed
    assert LINE in printed
    for name in ("results.md", "report.html"):
        assert "only the same search with the same seed repeats it" in (out / name).read_text()
    (row, _) = csv.DictReader(io.StringIO((out / "results.csv").read_text()))
    assert json.loads(row["schedule"])[0]["rank"] == 2


def test_a_run_that_never_changed_is_a_configuration(tmp_path: Path) -> None:
    better = dataclasses.replace(STRONG, metrics=metrics_of(4.0))
    result = search_result([WEAK, better])
    assert result.best == replace(BASE, {TSR: 0.5})
    out = written(search_result([WEAK, STRONG]), tmp_path)
    assert written(result, tmp_path) == out
    assert not (out / "best_schedule.json").exists(), "of an earlier search"
    assert from_dict(type(BASE), json.loads((out / "best.json").read_text())) == result.best


def test_the_conclusion_names_a_schedule_and_no_values() -> None:
    result = search_result([WEAK, STRONG, ROW])
    text = conclusion(search_runs(result.table, BASELINE, {}))
    assert text.startswith("the schedule of rank 1 has the largest delta_p, +3.00 %")
    assert "nothing can be concluded" in text
    assert seeds_text(result.table, BASELINE, METRICS) is None
