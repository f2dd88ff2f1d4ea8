"""The study of Rep-MTL: its rows go on where it was stopped, and its comparison is paired."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.delta import delta_p
from repmtl_ray.runs import loop
from repmtl_ray.studies import rep_mtl
from repmtl_ray.studies.recommend import recommend
from repmtl_ray.studies.rep_mtl import Row, compare, comparison_table, diagnosis_table
from tests.helpers.layouts import make_cityscapes
from tests.helpers.training import small_experiment


def row(variant: str, seed: int, miou: float, error: float) -> Row:
    return Row(
        variant=variant,
        seed=seed,
        experiment="",
        metrics={"segmentation/miou": miou, "depth/abs_error": error},
        diagnostics={"dominance": 0.5, "specialisation": 0.1},
        seconds=1.0,
    )


ROWS = [
    row("EW-log", 0, 40.0, 0.030),
    row("share", 0, 41.0, 0.029),
    row("random", 0, 40.5, 0.030),
    row("EW-log", 1, 44.0, 0.026),
    row("share", 1, 44.0, 0.025),
    row("random", 1, 44.0, 0.027),
    row("EW-log", 2, 42.0, 0.028),
    row("share", 2, 43.5, 0.028),
]


def test_differences_are_of_the_same_seed_against_the_mean_of_ew_log() -> None:
    base = {"segmentation/miou": 42.0, "depth/abs_error": 0.028}
    found = compare(ROWS, "share")
    assert found is not None
    by_key = {(r.variant, r.seed): delta_p(r.metrics, base).task for r in ROWS}
    expected = {seed: by_key["share", seed] - by_key["EW-log", seed] for seed in (0, 1, 2)}
    assert found.differences == pytest.approx(expected)
    values = list(expected.values())
    assert found.mean == pytest.approx(fmean(values))
    assert found.deviation == pytest.approx(stdev(values))
    # Student's t with two degrees of freedom has a closed form.
    t = fmean(values) / (stdev(values) / 3**0.5)
    assert found.p_value == pytest.approx(1 - t / (2 + t**2) ** 0.5)


def test_a_control_is_compared_over_the_seeds_that_both_have() -> None:
    found = compare(ROWS, "share", "random")
    assert found is not None
    assert set(found.differences) == {0, 1}
    assert compare(ROWS, "flipped") is None
    single = compare(ROWS[:2], "share")
    assert single is not None
    assert (single.deviation, single.p_value) == (None, None)


def test_tables_have_a_line_for_each_variant() -> None:
    table = comparison_table(ROWS)
    assert [line[0] for line in table[1:]] == ["EW-log", "share", "random"]
    assert {len(line) for line in table} == {len(table[0])}
    assert table[1][4] == ""  # the reference is not compared with itself
    assert diagnosis_table(ROWS)[1] == ["EW-log", "0.5", "0.1"]


def test_an_interrupted_study_goes_on_and_a_changed_experiment_is_trained_anew(
    scenes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small_experiment(epochs=1, data__num_train=4, data__num_val=2)
    variants = {name: rep_mtl.VARIANTS[name] for name in ("EW-log", "random")}
    file = tmp_path / "study" / "rows.jsonl"
    trained: list[str] = []
    original = loop.run

    def counted(own: object, **options: object) -> object:
        trained.append(str(own))
        return original(own, **options)

    monkeypatch.setattr(loop, "run", counted)
    steps = rep_mtl.run_study(experiment, variants, [0], file)
    first = next(steps)  # and then it is stopped
    assert {"dominance", "specialisation"} <= first.diagnostics.keys()
    assert "gradient_share" not in first.diagnostics  # without a penalty
    with file.open("a") as lines:
        lines.write('{"variant": "rand')  # it was stopped while it wrote
    rows = list(rep_mtl.run_study(experiment, variants, [0], file))
    assert len(trained) == 2
    assert rows[0] == first
    assert "gradient_share" in rows[1].diagnostics
    assert list(rep_mtl.run_study(experiment, variants, [0], file)) == rows
    assert len(trained) == 2
    changed = dataclasses.replace(experiment, batch_size=2)
    assert next(rep_mtl.run_study(changed, variants, [0], file)).experiment != first.experiment
    assert len(trained) == 3


def studied(experiment: Experiment, directory: Path) -> list[Row]:
    variants = {"EW-log": rep_mtl.VARIANTS["EW-log"]}
    return list(rep_mtl.run_study(experiment, variants, [0], directory / "rows.jsonl"))


def recommended(experiment: Experiment, directory: Path) -> list[Row]:
    options: dict[str, Any] = {"names": ("EW",), "seeds": (0,), "minutes": 0.5}
    return recommend(experiment, directory=directory, report=lambda line: None, **options).rows


@pytest.mark.parametrize("study", [studied, recommended])
def test_rows_of_other_samples_are_not_read(
    study: Callable[[Experiment, Path], list[Row]], tmp_path: Path
) -> None:
    data = make_cityscapes(tmp_path / "data", num_train=4, num_val=2, height=32, width=64)
    named = DataConfig(name="cityscapes", path=str(data))
    experiment = dataclasses.replace(small_experiment(epochs=1), data=named)
    before = study(experiment, tmp_path / "rows")
    assert study(experiment, tmp_path / "rows") == before
    file = data / "train" / "depth" / "2.npy"
    stored = file.read_bytes()
    np.save(file, np.load(file) + np.float32(0.01))
    after = study(experiment, tmp_path / "rows")
    assert after[0].metrics != before[0].metrics
    file.write_bytes(stored)
    assert study(experiment, tmp_path / "rows") == before


@pytest.mark.parametrize("name", ["streets", "rooms"])
def test_the_settings_are_experiments_of_both_sizes(name: str) -> None:
    assert rep_mtl.setting(name).epochs < 20
    assert rep_mtl.setting(name, "folder", full_size=True).epochs == 200
    assert rep_mtl.setting("office", "folder").model.weights == "efficientnet_lite0"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="setting is 'road'; expected one of streets, rooms"):
        rep_mtl.setting("road")
