"""What is said of a folder that no table can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repmtl_ray import cli
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.run_folder import claim, claim_study
from repmtl_ray.search.run_records import make_record, write_record
from repmtl_ray.studies.stored import stored_study

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
