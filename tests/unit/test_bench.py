"""The benches that others start: they run on a CPU at a tiny size, and say what they measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import agreement, compare, gpu, methods, office, workers
from repmtl_ray.config import DataConfig
from repmtl_ray.data.sources import open_streams
from tests.helpers.layouts import make_office
from tests.helpers.paths import ROOT


def test_the_bench_of_a_gpu_runs_anywhere_and_ends_in_time(capsys: pytest.CaptureFixture) -> None:
    rows = ["EW", "Rep-MTL, literal", "Rep-MTL, every 4th"]
    options = ["--device", "cpu", "--tiny", "--rounds", "1", "--precisions", "float32"]
    gpu.main([*options, "--rows", *rows])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "tiny" in line]
    assert [line[1] for line in lines] == rows
    assert all(float(line[3]) > 0 for line in lines)
    assert 0 < float(lines[0][7].strip(" |")) < 2
    gpu.main([*options, "--minutes", "0"])
    out = capsys.readouterr().out
    assert "no time was left for: tiny EW float32, " in out
    assert all(f"tiny {name} float32" in out for name in gpu.ROWS)


def test_weighted_heads_are_compared_with_heads_of_weight_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "WEIGHING", ("MGDA",))
    splits = {"train": methods.split_of(200, 1), "val": methods.split_of(100, 2)}
    head, one, official = methods.heads_table(splits, [0, 1])
    assert head[:3] == ["method", "heads", "click/auc"]
    assert (one[1], official[1]) == ("one", "official")
    assert one[2:-1] != official[2:-1]
    assert official[-1].count("±") == 1


def test_the_bench_of_a_gpu_goes_on_after_a_solver_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cvxpy.py").write_text("import its_own_solver")
    monkeypatch.delitem(sys.modules, "cvxpy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    cells = gpu.cells_of("Nash-MTL", gpu.TINY, "float32", "", "cpu", 1)
    assert cells == ("ModuleNotFoundError: No module named 'its_own_solver'", *4 * [""])


def test_two_commits_are_compared_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    turns: list[str] = []

    def seconds(checkout: Path, measure: str, repeats: int) -> float:
        turns.append(checkout.name)
        assert measure != "step" or (checkout / "repmtl_ray" / "config.py").is_file()
        return {"base": 2.0, "head": 3.0 if measure == "data" else 2.0}[checkout.name]

    monkeypatch.setattr(compare, "in_fresh_process", seconds)
    monkeypatch.setattr(compare, "checked_out", lambda folder, name, commit: Path(folder) / name)
    options = ["one", "other", "--rounds", "3", "--measures", "start", "data"]
    assert compare.main(options) == 1
    out = capsys.readouterr().out
    assert "| start | 1.00 | 1.00 to 1.00 |" in out
    assert "| data | 1.50 | 1.50 to 1.50 |" in out
    assert "slower than 1.1 times BASE: data" in out
    assert turns[:6] == ["base", "head", "head", "base", "base", "head"]
    assert compare.main([*options, "--limit", "2"]) == 0


@pytest.mark.parametrize("measure", ["step", "UW", "data", "start"])
def test_every_measure_takes_time(measure: Any) -> None:
    assert compare.measured(measure, 1) > 0


def test_a_checkout_has_the_files_of_its_commit(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    place = compare.checked_out(tmp_path, "base", "HEAD")
    assert (place / "repmtl_ray" / "config.py").is_file()
    with pytest.raises(SystemExit, match="'nothing' is no commit"):
        compare.checked_out(tmp_path, "head", "nothing")


@pytest.mark.slow  # two processes that load torch
def test_the_bench_of_workers_compares_six_ways(capsys: pytest.CaptureFixture) -> None:
    workers.main(["--rounds", "1", "--encoder", "resnet10t", "--size", "32", "--batch-size", "4"])
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines}
    assert list(rows) == list(workers.WAYS)
    assert [row[0] for row in rows.values()] == ["1", "2", "2", "1", "2", "2"]
    assert all(float(row[1]) > 0 for row in rows.values())
    sent = {name: row[4].strip(" |") for name, row in rows.items()}
    assert sent["EW, local statistics"] == sent["plain DDP loop"], "all gradients, once"
    assert sent["EW, global statistics"] == sent[workers.WITH_MESSAGES]
    assert float(sent["EW, global statistics"]) >= float(sent["plain DDP loop"]) > 0


def test_a_speed_up_is_that_of_the_same_loop_on_one_process() -> None:
    seconds = {"plain loop": 4.0, "plain DDP loop": 2.0, "EW, one worker": 5.0}
    found = {name: ([seconds.get(name, 4.0)] * 3, 2**20) for name in workers.WAYS}
    _, *rows = workers.table(found)
    assert [row[3:] for row in rows] == [
        ["1.00", "", ""],
        ["0.50", "2.00", "1.0"],
        ["1.00", "1.00", "1.0"],
        ["1.25", "", ""],
        ["1.00", "1.25", "1.0"],
        ["1.00", "1.25", "1.0"],
    ]


def test_photographs_come_to_the_trained_stage_as_the_whole_encoder_would_bring_them(
    tmp_path: Path,
) -> None:
    per_class = dict.fromkeys(("amazon", "dslr", "webcam"), 5)
    root = make_office(tmp_path, per_class=per_class, classes={"bike": 0, "mug": 1})
    split = office.split_of(root, "train")
    assert split.tasks is not None
    assert [task.name for task in split.tasks] == list(per_class) == list(split.rows)
    stream = open_streams(
        DataConfig(name="office31", path=str(root), height=office.SIZE, width=office.SIZE), "train"
    )[0]
    images = np.stack([stream.load(number)["image"] for number in (0, 1)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    features = split.rows[stream.name].fetch(np.array([0, 1]))["features"]
    assert features.shape == (2, 192, 2, 2)
    encoder, _ = office.network()
    model = office.make_model(split.tasks)
    with torch.no_grad():
        expected = encoder.eval()(pixels)
        assert torch.allclose(model.encoder.eval()(torch.from_numpy(features)), expected)
    assert expected.shape == (2, 1280)


def test_the_agreement_of_the_comparisons_is_what_the_documents_say() -> None:
    text = agreement.RESULTS.read_text()
    tables = agreement.comparisons(text)
    assert len(tables) == 4
    assert all(len(table) >= 43 and "EW" not in table for table in tables.values())
    for line in agreement.agreement(text):
        assert line.strip() in text, line
