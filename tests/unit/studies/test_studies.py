"""The commands that compare methods: their options, their cells, what they print; runs are made up."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray import benchmark
from repmtl_ray.config import DataConfig, Experiment, digest, replace, to_dict
from repmtl_ray.report.records import data_source
from repmtl_ray.search.run_records import commit_of_code
from repmtl_ray.studies import benchmark as studies_benchmark
from repmtl_ray.studies import methods
from repmtl_ray.studies.benchmark import BenchmarkResult
from repmtl_ray.studies.methods import ablation
from tests.helpers.commands import call
from tests.helpers.records import BASE, RUNS, record, single

GAIN = {"log": 2.0, "TSR": 1.0, "CSA": -0.5}
"""Points of mIoU that the made-up ablation books on each factor."""


def test_a_result_prints_its_table_and_what_may_be_concluded() -> None:
    records = [{**made, "history": []} for made in RUNS]
    result = BenchmarkResult(
        records=records, baseline=BASE, failures={"GLS": "no"}, directory="here"
    )
    text = str(result)
    assert re.search(r"^ *EW ", text, re.MULTILINE)
    assert "nothing can be concluded" in " ".join(text.split())
    assert text.endswith("all runs   here")
    assert (
        str(BenchmarkResult(records=[], baseline=[], failures={"GLS": "no"}, directory="here"))
        == "GLS: no"
    )


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What was asked of `benchmark`, which answers with made-up records."""
    calls = []

    def benchmark(
        experiment: Experiment, methods: Any, *, seeds: Any, **options: Any
    ) -> BenchmarkResult:
        calls.append((experiment, methods, list(seeds), options))
        records = []
        for name, changes in methods.items():
            bonus = sum(gain for factor, gain in GAIN.items() if f"+ {factor}" in name)
            for seed in seeds:
                own = replace(experiment, {**changes, "seed": seed})
                made = record(name, seed, (50 + bonus, 80, 0.03, 0.3))
                extra = {"history": [], "checkpoint": "/nowhere", "digest": digest(own)}
                records.append({**made, **extra, "experiment": to_dict(own)})
        base = [run for seed in seeds for run in single(seed, (50, 80, 0.03, 0.3))]
        return BenchmarkResult(records=records, baseline=base, failures={}, directory="/s/name")

    monkeypatch.setattr("repmtl_ray.studies.benchmark.benchmark", benchmark)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_ablation_books_every_gain_on_its_factor(
    capsys: pytest.CaptureFixture[str],
    compared: Any,
    tmp_path: Path,
) -> None:
    call("ablation", "scenes", "--pictures", 0)
    rows = list(csv.DictReader((tmp_path / "results/ablation.csv").read_text().splitlines()))
    assert len(rows) == 1 + 8
    printed = capsys.readouterr().out
    for factor, gain in GAIN.items():  # 1 point of 50 is 2 %, a quarter of delta_p
        assert re.search(rf"{factor}( +{re.escape(f'{gain * 2 / 4:+.2f}')}){{3}}\n", printed)
    assert (tmp_path / "results/report.html").exists()


def test_a_missing_cell_leaves_no_factors(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compared: Any,
    tmp_path: Path,
) -> None:
    cells = ablation()
    cells.pop("EW + TSR")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/factors.csv").write_text("of an earlier run")
    monkeypatch.setattr("repmtl_ray.cli.commands.ablation.ablation", lambda: cells)
    call("ablation", "scenes", "--pictures", 0)
    assert "points of delta_p by factor: n/a (a cell is missing)" in capsys.readouterr().out
    assert not (tmp_path / "results/factors.csv").exists()


def test_the_sensitivity_study_varies_one_value_at_a_time(compared: Any, tmp_path: Path) -> None:
    call("sensitivity", "scenes", "--seeds", 1, "--pictures", 0)
    _, cells, seeds, _ = compared[0]
    assert (len(cells), seeds) == (10 + 10 + 9, [0])
    call("sensitivity", "scenes", "--pictures", 0, "--vary", "csa", "--values", 0.3)
    assert [changes["regularizer.lambda_csa"] for changes in compared[1][1].values()] == [0.3]
    with pytest.raises(ValueError, match="--values needs one study"):
        call("sensitivity", "scenes", "--values", 0.3)


def test_a_checkpoint_that_is_not_here_costs_the_pictures_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
    compared: Any,
    tmp_path: Path,
) -> None:
    call("benchmark", "scenes", "--methods", "EW", "Rep-MTL")
    assert "pictures   none of EW, seed 0" in capsys.readouterr().err
    assert "What the model sees" not in (tmp_path / "results/report.html").read_text()


def test_presets_protocols_and_options_make_the_experiment(compared: Any) -> None:
    quiet = ("--pictures", 0, "--methods", "EW", "--no-published")
    call("benchmark", "cityscapes", "--data", "/d", *quiet)
    call("benchmark", "scenes", "--protocol", "last10", *quiet)
    call("benchmark", "office_31", "--data", "/d", "--weights", "/w.pth", *quiet)
    call("benchmark", "scenes", "--epochs", 3, "--set", "precision=float64", *quiet)
    paper, last, office, small = (call[0] for call in compared)
    assert (paper.model.encoder, paper.epochs, paper.model.pretrained) == ("resnet50", 200, True)
    assert (last.protocol, last.epochs, last.data.augment) == ("last10", 10, True)
    assert (office.model.weights, office.model.pretrained) == ("/w.pth", False)
    assert (small.epochs, small.precision, small.model.encoder) == (
        3,
        "float64",
        "test_efficientnet",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("citiscapes",), "did you mean 'cityscapes'"),
        (("scenes", "--data", "/d"), "is rendered and takes no folder"),
        (("cityscapes",), "--data DIR is missing"),
        (("scenes", "--protocol", "last11"), "did you mean 'last10'"),
        (("scenes", "--seeds", 0), "--seeds is 0"),
        (("scenes", "--set", "epochs"), "expected PATH=VALUE"),
        (("scenes", "--set", "epoch=1"), "did you mean 'epochs'"),
        (("scenes", "--methods", "EW", "EW"), "named twice"),
        (("office_31", "--data", "/d", "--protocol", "last10"), "not for 'office31'"),
    ],
)
def test_wrong_options_are_refused_with_their_remedy(
    compared: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call("benchmark", *arguments)
    assert not compared


def test_the_source_says_that_rendered_data_is_not_the_real_one(compared: Any) -> None:
    call("benchmark", "scenes", "--pictures", 0, "--methods", "EW")
    source = data_source(compared[0][0].data)
    assert source == (
        "rendered street scenes (not cityscapes), 192 to train and 64 to evaluate on, at 64 x 128"
    )


def test_records_name_the_commit_of_the_code() -> None:
    assert len(commit_of_code().rstrip("+")) >= 7


def test_a_benchmark_takes_names_of_methods_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything after the checks of its arguments stops the call."""
    seen: list[Any] = []

    def stop(_experiment: Any, methods: Any, *_rest: Any) -> None:
        seen.append(methods)
        raise LookupError

    monkeypatch.setattr(studies_benchmark, "method_runs", stop)
    experiment = Experiment(data=DataConfig(name="cityscapes"))
    for given in (["EW", "Rep-MTL"], ("EW", "Rep-MTL")):
        with pytest.raises(LookupError):
            benchmark(experiment, given)
    assert seen == 2 * [methods.methods(["EW", "Rep-MTL"])]
    for wrong in ([1], 3, "EW", ["EW", "EW"], {"EW": 3}):
        with pytest.raises(ValueError, match="methods"):
            benchmark(experiment, wrong)  # type: ignore[arg-type]
