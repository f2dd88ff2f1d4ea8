"""What is said of a folder that no table can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repmtl_ray import cli
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.run_folder import claim, claim_study
from repmtl_ray.search.draws import Draws
from repmtl_ray.search.run_records import Run, make_record, write_failure, write_record
from repmtl_ray.studies.benchmark import BenchmarkResult
from repmtl_ray.studies.methods import ablation
from repmtl_ray.studies.stored import stored_study
from tests.helpers.commands import call
from tests.helpers.records import record, single
from tests.helpers.searches import CSA, TSR

BASE = Experiment(data=DataConfig(name="cityscapes"), epochs=1)
FACTS = {"fingerprint": "f", "version": "0", "changes": "", "notes": [], "method": "EW"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A benchmark that has only begun."""
    directory = str(tmp_path / "one")
    claim(directory, BASE)
    claim_study(directory, {"baseline": "own"}, methods={"EW": {"policy.name": "EW"}})
    return directory


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main("report", [str(tmp_path)])
    assert ended.value.code == 2
    assert "is not the folder of a search or a benchmark" in capsys.readouterr().err


def test_a_study_without_a_finished_run_has_no_table(folder: str) -> None:
    with pytest.raises(ValueError, match=r"no run has finished, .* continue it with --resume"):
        stored_study(folder)


def test_a_folder_that_was_moved_without_its_baselines_says_so(folder: str) -> None:
    history = [{"segmentation/miou": 1.0, "depth/abs_error": 0.1}]
    write_record(folder, "EW-s0", make_record(BASE, FACTS, history, checkpoint=""))
    with pytest.raises(ValueError, match=r"single-task segmentation is missing in .*baselines"):
        stored_study(folder)


def test_a_damaged_record_is_named(folder: str) -> None:
    path = Path(folder, "records", "EW-s0.json")
    path.parent.mkdir()
    path.write_text(json.dumps({"method": "EW"})[:-3])
    with pytest.raises(ValueError, match=r"EW-s0\.json is damaged"):
        stored_study(folder)


def test_a_failure_is_named_with_its_reason_until_the_run_has_a_record(tmp_path: Path) -> None:
    directory = str(tmp_path / "two")
    claim(directory, BASE)
    claim_study(directory, {"baseline": "published"}, methods={"EW": {}, "wild": {}})
    history = [{"segmentation/miou": 1.0, "depth/abs_error": 0.1}]
    write_record(directory, "EW-s0", make_record(BASE, FACTS, history, checkpoint=""))
    wild = Run(name="wild-s0", label="wild, seed 0", experiment=BASE)
    write_failure(directory, wild, "its loss is nan")
    (tmp_path / "two/runs/wild-s1").mkdir(parents=True)
    found = stored_study(directory)
    assert isinstance(found, BenchmarkResult)
    assert found.failures == {"wild, seed 0": "its loss is nan", "wild-s1": "it has not finished"}
    facts = {**FACTS, "method": "wild"}
    write_record(directory, "wild-s0", make_record(BASE, facts, history, checkpoint=""))
    again = stored_study(directory)
    assert isinstance(again, BenchmarkResult)
    assert list(again.failures) == ["wild-s1"]


def test_a_configuration_that_was_refused_keeps_its_row_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(tmp_path / "search")
    claim(directory, BASE)
    claim_study(directory, {"space": {}}, methods={"mine": []}, num_samples=2)
    history = [{"segmentation/miou": 50.0, "depth/abs_error": 0.03, "delta_p_task": 1.0}]
    draws = Draws(BASE, directory=directory)
    trained, _ = draws.add({TSR: 0.5})
    assert trained.run is not None
    draws.add({"batch_size": 1, CSA: 0.5}, "mine")
    continued = Draws(BASE, directory=directory)  # which draws it first
    continued.add({"batch_size": 1, CSA: 0.5}, "mine")
    facts = {**FACTS, "status": "done"}
    write_record(
        directory,
        trained.name,
        make_record(trained.run.experiment, facts, history, checkpoint=""),
    )
    alone = [
        {"task": "segmentation", "history": history},
        {"task": "depth", "history": history},
    ]
    monkeypatch.setattr("repmtl_ray.studies.stored._baseline", lambda *arguments: alone)
    table = stored_study(directory).table  # type: ignore[union-attr]
    assert list(table["status"]) == ["done", "failed"]
    assert list(table["row"]) == ["", "mine"]
    assert "batch_size is 1" in table["error"][1]


@pytest.mark.parametrize("names", [tuple(ablation()), ("EW", "EW + TSR"), ("EW",)])
def test_the_report_of_an_ablation_says_what_each_factor_is_worth(
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of all cells the numbers, of some that one is missing, and of another benchmark nothing."""
    records = [
        {
            **record(name, seed, (50 + ("TSR" in name), 80, 0.03, 0.3)),
            "history": [],
            "checkpoint": "",
        }
        for name in names
        for seed in (0, 1)
    ]
    base = [run for seed in (0, 1) for run in single(seed, (50, 80, 0.03, 0.3))]
    stored = BenchmarkResult(records=records, baseline=base, failures={}, directory="here")
    monkeypatch.setattr("repmtl_ray.studies.stored.stored_study", lambda directory: stored)
    call("report", "anywhere", "--out", tmp_path, "--pictures", 0)
    printed = capsys.readouterr().out
    file = tmp_path / "factors.csv"
    if len(names) == 8:
        assert file.read_text().splitlines()[2] == "TSR,+0.50,+0.50,+0.50"
        assert "TSR" in printed.split("points of delta_p")[1]
    else:
        assert not file.exists()
        assert ("a cell is missing" in printed) == (len(names) == 2)
