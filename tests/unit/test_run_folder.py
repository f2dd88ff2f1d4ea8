"""What the folder of a study says of it, and what a resumed one may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune

from repmtl_ray import storage
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.run_folder import checked_place, claim, claim_study
from repmtl_ray.search.space import described

EXPERIMENT = Experiment(data=DataConfig(name="cityscapes"))


def space(low: float = 0.0, policies: tuple[str, ...] = ("EW", "UW")) -> dict[str, Any]:
    return {
        "regularizer": {"lambda_tsr": ray_tune.quniform(low, 1.0, 0.1)},
        "policy.name": ray_tune.choice(list(policies)),
        "regularizer.lambda_csa": ray_tune.grid_search([0.1, 0.9]),
        "seed": ray_tune.sample_from(lambda _: 3),
    }


def settings(**changes: Any) -> dict[str, Any]:
    return {"space": described(space(**changes)), "searcher": "random"}


def test_a_study_is_resumed_with_the_same_settings_and_more_samples(tmp_path: Path) -> None:
    claim_study(str(tmp_path), settings(), num_samples=4)
    claim_study(str(tmp_path), settings(), num_samples=4)
    claim_study(str(tmp_path), settings(), num_samples=6)
    with pytest.raises(ValueError, match="num_samples was 6, is 5, which is fewer"):
        claim_study(str(tmp_path), settings(), num_samples=5)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"low": 0.5}, "space.regularizer.lambda_tsr.lower was 0.0, is 0.5"),
        ({"policies": ("EW",)}, r"space.policy.name.categories was \['EW', 'UW'\], is \['EW'\]"),
    ],
)
def test_another_space_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    claim_study(str(tmp_path), settings())
    with pytest.raises(ValueError, match=difference):
        claim_study(str(tmp_path), settings(**changes))
    with pytest.raises(ValueError, match="searcher was 'random', is 'optuna'"):
        claim_study(str(tmp_path), {**settings(), "searcher": "optuna"})


def test_methods_are_added_to_a_benchmark_and_not_changed(tmp_path: Path) -> None:
    claim_study(str(tmp_path), {}, methods={"EW": {"policy.name": "EW"}, "x": {"epochs": 3}})
    claim_study(str(tmp_path), {}, methods={"UW": {"policy.name": "UW"}})
    with pytest.raises(ValueError, match=r"x.epochs was 3, is 4"):
        claim_study(str(tmp_path), {}, methods={"x": {"epochs": 4}})


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/x", "", ".", "..", "a/b", "a\nb", "baselines", " x"]
)
def test_a_name_that_is_no_folders_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected the name of one folder"):
        checked_place(str(tmp_path), name, "fit", EXPERIMENT)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_written_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for location, reason in (
        (tmp_path / "file", "a file is in the way"),
        (tmp_path / "file/deeper", "a file is in the way"),
        ("/proc/nowhere", "no such file or folder"),
        ("", "storage is empty"),
        ("file://host/folder", "no local folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            checked_place(str(location), None, "fit", EXPERIMENT)
    checked_place(tmp_path / "new/deeper", None, "fit", EXPERIMENT)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    with pytest.raises(ValueError, match="a file is in the way"):
        claim(f"{tmp_path}/file/run", EXPERIMENT)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///tmp/with blank", "/tmp/with blank"),
        ("file:///tmp/with%20blank", "/tmp/with blank"),
        ("file:///tmp/50%25", "/tmp/50%"),
        ("file:///tmp/50%", "/tmp/50%"),
        ("file://localhost/tmp/a", "/tmp/a"),
        ("file:/tmp/a", "/tmp/a"),
    ],
)
def test_a_file_uri_is_a_folder(uri: str, path: str) -> None:
    assert storage.absolute(uri) == path
