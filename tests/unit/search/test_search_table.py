"""The table of a search, its picture and its files; single-task experiments."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import ray
from PIL import Image

from repmtl_ray import code_version
from repmtl_ray.cli import results as cli_results
from repmtl_ray.cli.invocation import invocation
from repmtl_ray.config import Experiment, digest, from_dict, replace
from repmtl_ray.report import heatmap
from repmtl_ray.report.heatmap import MAX_CELLS, delta_p_heatmap
from repmtl_ray.report.runs import Run, conclusion, search_runs
from repmtl_ray.report.search_table import search_text, seeds_text
from repmtl_ray.search import SearchResult
from repmtl_ray.search.run_records import other_code
from repmtl_ray.search.study import reason_of, single_task
from tests.helpers.searches import (
    BASE,
    BASELINE,
    CSA,
    METRICS,
    OUTCOMES,
    POLICY,
    RATE,
    TAU,
    TSR,
    Outcome,
    metrics_of,
    search_result,
)

REFUSED = "policy.name is 'UWW', which is no policy; did you mean 'UW' or 'UW-SO'?"


def test_a_single_task_experiment_is_one_plain_loss_of_the_same_protocol() -> None:
    alone = single_task(BASE, "depth")
    assert alone.tasks == ("depth",)
    assert (alone.policy.name, alone.policy.log_losses) == ("stl", False)
    assert not alone.regularizer.active
    for part in ("data", "optimizer", "epochs", "batch_size", "seed", "precision", "protocol"):
        assert getattr(alone, part) == getattr(BASE, part)


@pytest.mark.parametrize(
    "overrides",
    [
        {POLICY: "CAGrad", "policy.arguments": {"c": 0.2}, "policy.gradients": "representation"},
        {TSR: 0.1, CSA: 0.0},
        {TAU: 2.0},
        {"model.representation": "encoder.layer3"},
        {"tasks": ["depth", "segmentation"]},
    ],
    ids=str,
)
def test_baselines_are_shared_by_experiments_with_other_policies_and_penalties(
    overrides: dict[str, Any],
) -> None:
    assert single_task(replace(BASE, overrides), "depth") == single_task(BASE, "depth")


@pytest.fixture
def table() -> Any:
    return search_result(OUTCOMES).table


def test_the_table_is_sorted_by_delta_p_with_failed_trials_last(table: Any) -> None:
    assert list(table["rank"]) == [1, 2, 3, 4, 5, 6]
    assert list(table["policy"]) == ["GLS", "DWA", "EW", "RLW", "UWW", "UW"]
    assert list(table["status"]) == ["stopped", "done", "done", "stopped", "failed", "failed"]
    assert list(table["delta_p_task"][:3]) == [3.0, 1.25, -2.5]
    assert table["error"].tolist() == ["", "", "", "", REFUSED, "loss is nan"]
    assert list(table.index) == list(range(6))


def test_a_row_says_what_was_searched_and_what_came_out(table: Any) -> None:
    row = table.iloc[1]
    assert row["lambda_tsr"] == 0.7
    assert (row["lambda_csa"], row["tau"]) == (0.9, 0.5)
    assert row["learning_rate"] == BASE.optimizer.learning_rate
    assert bool(row["log_losses"]) is True
    assert (row["segmentation/miou"], row["depth/abs_error"], row["epoch"]) == (42.0, 0.05, 10)
    assert row["checkpoint"] == "/runs/1.25"
    assert row["config"] == {TSR: 0.7, POLICY: "DWA"}
    assert row["digest"] == digest(replace(BASE, row["config"]))
    assert (row["protocol"], row["seed"]) == ("libmtl", 0)
    assert "time_total_s" not in table


def test_delta_p_is_seen_when_a_wide_table_is_printed(table: Any) -> None:
    assert list(table.columns[:2]) == ["rank", "delta_p_task"]
    with pandas.option_context("display.width", 80, "display.max_columns", 0):
        assert "delta_p_task" in str(table)


def test_a_combination_that_no_experiment_allows_keeps_its_row() -> None:
    """Each of its values passed `check_space`; together they fail, and must not take the table
    along."""
    refused = Outcome({"batch_size": 1, CSA: 0.5})
    table = search_result([refused, OUTCOMES[0]]).table
    assert list(table["status"]) == ["done", "failed"]
    assert table["lambda_csa"].tolist() == [0.9, 0.5]
    assert table["digest"][1] == ""
    assert "batch_size is 1" in table["error"][1]


def test_a_table_without_any_finished_epoch() -> None:
    table = search_result([OUTCOMES[2], OUTCOMES[2]]).table
    assert list(table["rank"]) == [1, 2]
    assert table["delta_p_task"].isna().all()
    text = search_text(table, BASELINE, METRICS)
    assert text.count("loss is nan") == 2


def test_the_best_experiment_is_neither_failed_nor_stopped_early_where_there_is_another() -> None:
    assert search_result(OUTCOMES).best == replace(BASE, {TSR: 0.7, POLICY: "DWA"})
    stopped = search_result(OUTCOMES[2:4])
    assert stopped.best == replace(BASE, {TSR: 0.3, POLICY: "GLS"})
    assert search_result(OUTCOMES[1:3]).best is None


def test_a_configuration_that_lost_a_seed_to_early_stopping_is_not_compared() -> None:
    lucky, lost = metrics_of(9.0), metrics_of(-9.0, epoch=4)
    outcomes = [
        Outcome({TSR: 0.1, "seed": 0}, metrics=lucky),
        Outcome({TSR: 0.1, "seed": 1}, metrics=lost),
        *(Outcome({TSR: 0.2, "seed": s}, metrics=metrics_of(1.0 + s)) for s in (0, 1)),
        *(Outcome({TSR: 0.3, "seed": s}, metrics=metrics_of(-1.0 - s)) for s in (0, 1)),
    ]
    result = search_result(outcomes)
    assert result.best is not None
    assert (result.best.regularizer.lambda_tsr, result.best.seed) == (0.2, 1)
    text = conclusion(search_runs(result.table, result.baseline, {}))
    assert text.startswith("EW (lambda_tsr 0.2) has the largest delta_p, +1.50 ± 0.71 %")
    assert text.endswith("leaves out 1 configuration of which a run was stopped early.")


def test_configurations_that_differ_in_what_no_column_shows_are_told_apart() -> None:
    outcomes = [
        Outcome({TSR: 0.0, CSA: 0.0, "batch_size": size, "seed": seed}, metrics=metrics_of(value))
        for size, seed, value in ((4, 0, 1.0), (4, 1, 2.0), (8, 0, 3.0), (8, 1, 5.0))
    ]
    result = search_result(outcomes)
    runs = search_runs(result.table, result.baseline, {})
    assert [run.configuration for run in runs] == [
        f"EW (no penalties), batch_size {size}" for size in (8, 8, 4, 4)
    ]
    assert (
        "batch_size 8, itself a reference, has the largest delta_p, +4.00 ± 1.41 %"
        in conclusion(runs)
    )


def test_histories_belong_to_the_rows_of_the_table() -> None:
    result = search_result(OUTCOMES)
    best = result.table.iloc[0]
    assert result.histories[best["trial"]] == [
        {"epoch": 4, "segmentation/miou": 41.5, "depth/abs_error": 0.05}
    ]
    assert set(result.histories) <= set(result.table["trial"])


def ray_error(cause: Any) -> Any:
    return ray.exceptions.RayTaskError("_trial", f"Traceback ...\n{cause}", cause)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("plain"), "plain"),
        (ValueError("several\n\n  lines  \n\n"), "lines"),
        (ray_error(ValueError("wrapped once")), "wrapped once"),
        (ray_error(ray_error(ValueError("wrapped twice"))), "wrapped twice"),
        (ray_error(ValueError("as its cause")).as_instanceof_cause(), "as its cause"),
        (KeyError(), "KeyError"),
    ],
    ids=["plain", "lines", "once", "twice", "cause", "empty"],
)
def test_the_reason_of_a_failure_is_the_users_own_error(error: Any, reason: str) -> None:
    assert reason_of(error) == reason


def lines_of(table: Any, **options: Any) -> Any:
    return search_text(table, BASELINE, METRICS, **options).splitlines()


def test_the_text_is_aligned_with_a_single_task_row_and_reasons_at_the_end(table: Any) -> None:
    lines = lines_of(table)
    assert len(lines) == 2 + 6 + 1 + 2
    assert len({len(line) for line in lines[:9]}) == 1, "all rows are equally long"
    headings = lines[0].split()
    assert headings[:4] == ["rank", "delta_p", "%", "policy"]
    for heading in ("log losses", "lambda_tsr", "lambda_csa", "tau", "mIoU %", "abs. err."):
        assert heading in lines[0]
    assert set(lines[1]) == {"-", " "}
    assert [line.split()[1] for line in lines[2:5]] == ["+3.00", "+1.25", "-2.50"]
    assert lines[2].split() == (
        ["1", "+3.00", "GLS", "yes", "0.3", "0.9", "0.5", "4", "stopped", "41.50", "0.0500"]
    )
    assert lines[8].split() == ["-", "0.00", "single-task", "40.00", "0.0500"]
    assert lines[9:] == [f"rank 5: {REFUSED}", "rank 6: loss is nan"]


def test_rows_are_shown_by_name_with_shares_and_seeds_and_are_the_references() -> None:
    no_penalty = {TSR: 0.0, CSA: 0.0}
    outcomes = [
        Outcome({**no_penalty, "seed": 0}, metrics=metrics_of(1.0), row="EW-log"),
        Outcome({**no_penalty, "seed": 1}, metrics=metrics_of(2.0), row="EW-log"),
        Outcome({"regularizer.share": 0.1, "seed": 0}, metrics=metrics_of(1.5)),
        Outcome({"regularizer.share": 0.1, "seed": 1}, metrics=metrics_of(2.2)),
    ]
    result = search_result(outcomes)
    text = search_text(result.table, result.baseline, METRICS)
    head, _, *lines = text.splitlines()
    assert "share" in head
    assert "seed" in head
    assert sum("EW-log" in line for line in lines) == 2
    runs = search_runs(result.table, result.baseline, {})
    configurations = {run.configuration for run in runs}
    assert "EW-log" in configurations
    assert len(configurations) == 2  # seeds of one configuration are together
    assert {run.is_reference for run in runs if run.configuration == "EW-log"} == {True}
    # In charts, a policy with penalties is another method than the policy alone.
    assert {run.method for run in runs} == {"EW-log", "EW + penalties"}
    assert "nothing can be concluded" in conclusion(runs)


def test_several_seeds_are_one_row_with_mean_and_deviation_and_the_best_mean_is_the_best() -> None:
    outcomes = [
        Outcome({TSR: 0.1, CSA: 0.0, "seed": 0}, metrics=metrics_of(3.0)),
        Outcome({TSR: 0.1, CSA: 0.0, "seed": 1}, metrics=metrics_of(-3.0)),
        Outcome({TSR: 0.2, CSA: 0.0, "seed": 0}, metrics=metrics_of(2.0)),
        Outcome({TSR: 0.2, CSA: 0.0, "seed": 1}, metrics=metrics_of(1.0)),
        Outcome({TSR: 0.3, CSA: 0.0, "seed": 1}, error="loss is nan"),
    ]
    result = search_result(outcomes)
    text = seeds_text(result.table, result.baseline, METRICS)
    assert text is not None
    head, _, first, second, alone, failure = text.splitlines()
    assert head.split()[:3] == ["delta_p", "%", "seeds"]
    assert first.split()[:4] == ["+1.50", "±", "0.71", "2"]
    assert second.split()[:4] == ["+0.00", "±", "4.24", "2"]
    assert "0.2" in first.split()
    assert "yes" in first.split()  # log losses
    assert alone.split()[:2] == ["0.00", "single-task"]
    assert failure == "EW, seed 1: loss is nan"
    assert str(result).startswith(text)
    assert "so it may come from the seeds and nothing can be concluded" in " ".join(
        str(result).split()
    )
    assert result.best is not None
    assert (result.best.regularizer.lambda_tsr, result.best.seed) == (0.2, 0)
    with_front = result.table.assign(pareto=True)
    assert seeds_text(with_front, result.baseline, METRICS) is None  # a front is one of runs
    one_seed = search_result(outcomes[::2])
    assert seeds_text(one_seed.table, one_seed.baseline, METRICS) is None


def test_columns_that_say_nothing_are_left_out() -> None:
    done = search_result([OUTCOMES[0], OUTCOMES[4]]).table
    heading = lines_of(done)[0]
    assert "status" not in heading
    assert "epoch" not in heading
    assert "lr" not in heading
    rates = [Outcome({RATE: rate}, metrics=metrics_of(1.0)) for rate in (1e-4, 2.5e-4)]
    lines = lines_of(search_result(rates).table)
    assert "lr" in lines[0]
    assert "0.00025" in lines[3]


def test_markdown_is_a_table_followed_by_a_list(table: Any) -> None:
    lines = lines_of(table, markdown=True)
    cells = [line.split(" | ") for line in lines[:9]]
    assert len({len(row) for row in cells}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines[:9])
    assert set(lines[1]) <= set("| -")
    assert lines[9:] == ["", f"- rank 5: {REFUSED}", "- rank 6: loss is nan"]
    done = search_result([OUTCOMES[0]]).table
    assert len(lines_of(done, markdown=True)) == 4


def searched(values: Any, delta_ps: Any = None) -> Any:
    """A table of trials at pairs (lambda_tsr, lambda_csa)."""
    delta_ps = delta_ps or [float(index) - 1 for index in range(len(values))]
    results = [
        Outcome({TSR: tsr, CSA: csa}, metrics=metrics_of(delta_p))
        for (tsr, csa), delta_p in zip(values, delta_ps, strict=True)
    ]
    return search_result(results).table


def many_values() -> list[tuple[float, ...]]:
    draws = np.random.default_rng(0).uniform(0, 2, (MAX_CELLS + 3, 2))
    return [(float(tsr), float(csa)) for tsr, csa in draws]


@pytest.mark.parametrize(
    "values",
    [
        [(tsr, csa) for tsr in (0.7, 0.9, 1.1) for csa in (0.7, 0.9)],
        [(0.1, 0.9), (0.5, 0.1), (0.1, 0.9)],
        many_values(),
        [(0.9, 0.9)],
    ],
    ids=["grid", "some cells", "scatter", "one"],
)
def test_the_heatmap_is_a_png_with_something_on_it(tmp_path: Path, values: Any) -> None:
    path = tmp_path / "delta_p.png"
    delta_p_heatmap(runs_of(searched(values)), path, title="scenes")
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert width >= 800
    assert height >= 600
    assert len(np.unique(pixels @ [2**16, 2**8, 1])) > 100, "colours of a scale"


def runs_of(table: pandas.DataFrame) -> list[Run]:
    return search_runs(table, BASELINE, {})


def test_each_cell_shows_its_best_trial_that_did_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    draw = heatmap.draw_heat_map

    def recorded(axes: Any, values: Any, texts: Any, **options: Any) -> Any:
        drawn["texts"], drawn["rows"], drawn["columns"] = texts, options["rows"], options["columns"]
        return draw(axes, values, texts, **options)

    monkeypatch.setattr(heatmap, "draw_heat_map", recorded)
    results = [
        Outcome({TSR: 0.1, CSA: 0.1, POLICY: "EW"}, metrics=metrics_of(1.0)),
        Outcome({TSR: 0.1, CSA: 0.1, POLICY: "UW"}, metrics=metrics_of(2.0)),
        Outcome({TSR: 0.5, CSA: 0.1, POLICY: "GLS"}, metrics=metrics_of(-3.0)),
        Outcome({TSR: 0.5, CSA: 0.1, POLICY: "DWA"}, error="x"),
    ]
    delta_p_heatmap(runs_of(search_result(results).table), tmp_path / "p.png", title="")
    assert (drawn["rows"], drawn["columns"]) == (["0.1"], ["0.1", "0.5"])
    assert drawn["texts"] == [["+2.0\nUW", "-3.0\nGLS"]]


def test_a_search_without_results_still_has_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "delta_p.png"
    delta_p_heatmap(runs_of(search_result([OUTCOMES[1]]).table), path, title="nothing")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 2_000


def written(tmp_path: Path, results: Any, best: Any, notes: tuple[()] = ()) -> Path:
    found = SearchResult(
        table=search_result(results).table,
        baseline=BASELINE,
        best=best,
        directory="/storage/tune-x",
        experiment=BASE,
        notes=notes,
    )
    cli_results.write_results(found, tmp_path / "out", metrics=METRICS, title="scenes")
    return tmp_path / "out"


def test_results_are_a_csv_a_table_a_picture_and_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = replace(BASE, {TSR: 0.3, POLICY: "GLS", "policy.arguments": {}})
    out = written(tmp_path, OUTCOMES, best)
    names = {"results.csv", "results.md", "delta_p.png", "best.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [row["policy"] for row in rows] == ["GLS", "DWA", "EW", "RLW", "UWW", "UW"]
    assert "config" not in rows[0]
    assert float(rows[0]["delta_p_task"]) == 3.0
    assert (out / "results.md").read_text().startswith("scenes\n\n| rank | delta_p % | policy |")
    read = from_dict(Experiment, json.loads((out / "best.json").read_text()))
    assert read == best
    assert digest(read) == digest(best)
    printed = capsys.readouterr().out
    assert "single-task" in printed
    assert f"{invocation('train')} {out / 'best.json'}" in printed
    assert "--resume tune-x" in printed


def test_notes_on_the_data_are_in_the_table_and_in_the_report(tmp_path: Path) -> None:
    out = written(tmp_path, OUTCOMES, BASE, notes=("office31: the splits are our own.",))
    for name in ("results.md", "report.html"):
        assert "office31: the splits are our own." in (out / name).read_text()


def test_without_a_best_trial_an_earlier_searchs_best_is_not_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = written(tmp_path, OUTCOMES, BASE)
    assert (out / "best.json").exists()
    written(tmp_path, OUTCOMES[1:2], None)
    assert not (out / "best.json").exists()
    assert "no trial finished an epoch" in capsys.readouterr().err


def test_a_record_of_other_sources_says_so_when_it_is_read_back() -> None:
    here = {**code_version.current(), "metrics": {}}
    assert other_code(here) == ""
    note = other_code({**here, "sources": "0123456789ab"})
    assert "sources 0123456789ab" in note
    assert code_version.source_digest() in note
    assert "unknown" in other_code({"metrics": {}})
