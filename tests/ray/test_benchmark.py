"""A whole benchmark: single-task rows first, failures on their own, resume, and all its files.

One run of two methods and one seed by the holdout protocol, which all tests here read. Its runs
train in this process (`tests/helpers/local_mode.py`).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray import cli, protocols
from repmtl_ray.cli import comparison
from repmtl_ray.cli.options import new_parser
from repmtl_ray.studies.benchmark import benchmark
from repmtl_ray.studies.methods import method
from tests.helpers.benchmark_options import SMALL
from tests.helpers.commands import call
from tests.helpers.local_mode import study_here

pytestmark = pytest.mark.ray
METHODS = {"EW": method("EW"), "wild": {**method("EW"), "optimizer.learning_rate": 1e30}}


def arguments_for(folder: Path, *more: Any) -> argparse.Namespace:
    options = ["scenes", *SMALL, "--storage", str(folder), "--out", str(folder / "out"), *more]
    parser = new_parser(None)
    comparison.add_comparison_options(parser)
    return parser.parse_args(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def done(folder: Path) -> Any:
    """Run once: EW, and a method that diverges."""
    with pytest.MonkeyPatch.context() as patch:
        study_here(patch)
        arguments = arguments_for(folder, "--name", "one", "--log", "csv", "--log-every", "1")
        return comparison.run(arguments, METHODS, stem="benchmark")


def test_every_run_has_its_own_log(done: Any, folder: Path) -> None:
    logs = sorted(folder.glob("one/runs/*/logs/epochs.csv"))
    histories = [record["history"] for record in done[0].records]
    assert len(logs) == len(histories) == 1, "the run that diverges ends before its first epoch"
    rows = list(csv.DictReader(logs[0].read_text().splitlines()))
    expected = [metrics["depth/abs_error"] for metrics in histories[0]]
    assert [float(row["depth/abs_error"]) for row in rows] == pytest.approx(expected)
    assert len(list(folder.glob("baselines/runs/*/logs/epochs.csv"))) == 2


def test_a_method_that_fails_does_not_take_the_others_with_it(done: Any, folder: Path) -> None:
    result, summary = done
    assert [record["method"] for record in result.records] == ["EW"]
    assert list(result.failures) == ["wild, seed 0"]
    told = r"task '(segmentation|depth)': loss is .* at step \d+ with policy 'EW'"
    assert re.search(told, result.failures["wild, seed 0"])
    assert [row.method for row in summary.rows] == ["stl", "EW"]
    assert "Failed: wild, seed 0: task" in (folder / "out/benchmark.md").read_text()


def test_a_record_has_all_that_a_row_must_say(done: Any) -> None:
    (record,) = done[0].records
    assert (record["protocol"], record["reported_split"]) == ("holdout", "val")
    assert record["source"].startswith("rendered street scenes (not cityscapes), 16 to train")
    assert "epochs was 200, is 2" in record["changes"]
    assert (record["seed"], len(record["digest"])) == (0, 12)
    assert record["commit"]
    assert record["epochs"] == [protocols.best_epoch(record["history"])]
    assert len(record["history"]) == 2
    assert {run["task"] for run in done[0].baseline} == {"segmentation", "depth"}


def test_the_reported_split_is_not_the_one_the_epoch_was_chosen_on(done: Any) -> None:
    (record,) = done[0].records
    chosen = record["history"][record["epochs"][0] - 1]
    assert record["selection_metrics"]["depth/abs_error"] == chosen["depth/abs_error"]
    assert record["metrics"]["depth/abs_error"] != chosen["depth/abs_error"]


def test_tables_and_a_report_with_pictures_are_left(done: Any, folder: Path) -> None:
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"benchmark.csv", "benchmark.md", "benchmark.tex", "report.html"}
    rows = list(csv.DictReader((out / "benchmark.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["stl", "EW"]
    assert all(row["segmentation/miou_sd"] == "" for row in rows), "one seed has no deviation"
    report = (out / "report.html").read_text()
    pictures = re.findall(r'alt="(predictions|saliency|affinity)"', report)
    assert sorted(pictures) == ["affinity", "predictions", "saliency"]
    assert "What the model sees: EW, seed 0" in report


def test_the_report_command_makes_the_same_tables_from_the_records(
    done: Any, folder: Path, tmp_path: Path
) -> None:
    cli.main("report", [str(folder / "one"), "--out", str(tmp_path), "--pictures", "1"])
    made = (tmp_path / "benchmark.csv").read_text()
    assert made == (folder / "out" / "benchmark.csv").read_text()
    told = (folder / "out" / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.md").read_text() == told, "with the reason of the run that failed"
    assert not (tmp_path / "factors.csv").exists()
    assert "What the model sees: EW, seed 0" in (tmp_path / "report.html").read_text()


def test_a_finished_benchmark_resumes_without_training(
    done: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = folder / "one/records"
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    options = ["scenes", *SMALL, "--storage", folder, "--out", folder / "again"]
    options += ["--resume", "one", "--methods", "EW"]
    call("benchmark", *options)
    assert {path.name: path.stat().st_mtime_ns for path in records.iterdir()} == before
    printed = capsys.readouterr().out
    assert "EW, seed 0: from " in printed
    assert "single-task depth: from " in printed
    old, new = ((folder / name / "benchmark.csv").read_text() for name in ("out", "again"))
    assert old == new


def test_the_single_task_rows_serve_the_next_benchmark_of_the_same_protocol(
    done: Any, folder: Path
) -> None:
    kept = list((folder / "baselines/records").iterdir())
    assert len(kept) == 2
    experiment = json.loads(kept[0].read_text())["experiment"]
    assert (experiment["protocol"], experiment["policy"]["name"]) == ("holdout", "stl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {"x": {"policy.name": "UWW"}}}, "method 'x'.*did you mean"),
        ({"methods": {"x": {"data.augment": True}}}, "'x' changes the data or the protocol"),
        ({"methods": {}}, "there is none"),
        ({"methods": {"stl": {}}}, "'stl' is trained anyway"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"resume": True, "name": "never"}, "there is no benchmark at"),
        ({"resume": True}, "needs the name"),
        ({"name": "one"}, "exists already"),
        ({"baseline": "published"}, "has no published single-task row"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    done: Any, folder: Path, options: dict[str, Any], message: str
) -> None:
    experiment = comparison.experiment_of(arguments_for(folder))
    with pytest.raises(ValueError, match=message):
        benchmark(
            experiment,
            **{"methods": {"EW": method("EW")}, "storage": str(folder), **options},
        )
