"""Which splits the preparation converts, and which it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repmtl_ray.cli.commands import prepare
from repmtl_ray.config import DataConfig
from repmtl_ray.data.stream import MissingSplitError
from tests.helpers import forms
from tests.helpers.layouts import make_office

DENSE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "npy": ("nyuv2", lambda root: forms.make_npy(root, "nyuv2")),
    "Parquet": ("nyuv2", lambda root: forms.make_parquet(root, "nyuv2")),
    "official Cityscapes": ("cityscapes", forms.make_official_cityscapes),
    "official NYUv2": ("nyuv2", forms.make_mat),
}


def office(root: Path) -> DataConfig:
    make_office(root, per_class={"amazon": 6, "dslr": 6}, classes={"mug": 0, "pen": 1})
    return DataConfig(name="office31", path=str(root), domains=("amazon", "dslr"))


@pytest.mark.parametrize("form", DENSE)
def test_a_test_split_that_the_data_have_not_is_mentioned(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make = DENSE[form]
    data = DataConfig(name=name, path=str(make(tmp_path)))
    assert list(prepare._open(data, None)) == ["train", "val"]
    assert "without a test split: " in capsys.readouterr().out
    with pytest.raises(MissingSplitError):
        prepare._open(data, ["test"])


def test_test_lists_that_nobody_made_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = office(tmp_path)
    for path in (tmp_path / "splits").glob("*_test.txt"):
        path.unlink()
    assert list(prepare._open(data, None)) == ["train", "val"]
    assert "amazon_test.txt is missing" in capsys.readouterr().out


def test_a_test_split_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    data = office(tmp_path)
    (tmp_path / "dslr/images/pen/frame_0001.jpg").unlink()
    with pytest.raises(ValueError, match=r"dslr_test\.txt line 2 names .*which is not in"):
        prepare._open(data, None)
