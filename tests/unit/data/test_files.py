"""Which files are data, and which are one and the same: in every form of the dense data sets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from repmtl_ray.config import DataConfig
from repmtl_ray.data.files import is_hidden, visible_below
from repmtl_ray.data.sources import form_of
from tests.helpers import forms

SUFFIXES = (".npy", ".png", ".parquet", ".jpg", "_leftImg8bit.png", "_disparity.png")
JUNK = (
    *(".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"),
    *(f"._0{suffix}" for suffix in SUFFIXES),
    *(
        f"{folder}/0{suffix}"
        for folder in ("__MACOSX", ".ipynb_checkpoints")
        for suffix in SUFFIXES
    ),
)
FORMS = {
    "npy": ("nyuv2", forms.make_npy),
    "parquet": ("nyuv2", forms.make_parquet),
    "official": ("cityscapes", lambda root, name: forms.make_official_cityscapes(root)),
    "mat": ("nyuv2", lambda root, name: forms.make_mat(root)),
}


def made(root: Path, form: str) -> tuple[str, Path]:
    """The data set's name, and its folder."""
    name, make = FORMS[form]
    return name, make(root, name)


def litter(root: Path) -> None:
    """What macOS, Windows and notebooks leave behind, in every folder."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in JUNK:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\x00\x05\x16\x07")


@pytest.mark.parametrize(
    "path",
    [
        *(".DS_Store", "._0.npy", "a/._0.png", ".ipynb_checkpoints/0.npy", "__MACOSX/train/0.npy"),
        *("Thumbs.db", "thumbs.DB", "Desktop.ini", "@eaDir/0.npy", "$RECYCLE.BIN/0.npy"),
    ],
)
def test_what_systems_leave_behind_is_hidden(path: str) -> None:
    assert is_hidden(path)


@pytest.mark.parametrize("path", ["0.npy", "./a/0.npy", "../a/0.npy", "a.b/c", "train/Thumbs"])
def test_other_names_are_not_hidden(path: str) -> None:
    assert not is_hidden(path)


def test_a_hidden_folder_above_the_data_hides_nothing(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "data"
    root.mkdir(parents=True)
    (root / "a.parquet").touch()
    (root / "._a.parquet").touch()
    assert visible_below(root, "*.parquet") == [root / "a.parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_what_systems_leave_behind_changes_no_sample(tmp_path: Path, form: str) -> None:
    name, clean = made(tmp_path / "clean", form)
    littered = shutil.copytree(clean, tmp_path / "littered")
    litter(littered)
    for split in ("train", "val"):
        one, other = (forms.opened(root, name, split) for root in (clean, littered))
        assert one.num_samples == other.num_samples
        for index in range(one.num_samples):
            expected, sample = one.load(index), other.load(index)
            assert {key: values.tobytes() for key, values in expected.items()} == {
                key: values.tobytes() for key, values in sample.items()
            }


def test_a_folder_of_nothing_but_leavings_is_no_data(tmp_path: Path) -> None:
    litter(tmp_path)
    for name in ("nyuv2", "cityscapes"):
        assert form_of(DataConfig(name=name, path=str(tmp_path))) == "npy"
        forms.refused(tmp_path, name, r"has no folder train/image; .* holds notes\.txt\.")


FILES = {
    "npy": ("train/image/0.npy", "val/image/2.npy"),
    "official": (
        "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png",
        "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png",
    ),
    "parquet": ("data/train-00000-of-00002.parquet", "data/val-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("form", FILES)
def test_one_file_in_two_splits_is_refused(
    tmp_path: Path, form: str, link: Callable[[Path, Path], None], split: str
) -> None:
    name, root = made(tmp_path, form)
    train, val = (root / path for path in FILES[form])
    val.unlink()
    link(train, val)
    with pytest.raises(ValueError, match=rf"{name}: .*{val.name} and .*{train.name} are one file"):
        forms.opened(root, name, split)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("form", FILES)
def test_a_copy_in_another_split_is_noted(tmp_path: Path, form: str, split: str) -> None:
    name, root = made(tmp_path, form)
    train, val = (root / path for path in FILES[form])
    if form != "official":  # whose frames were made equal
        assert forms.opened(root, name, split).notes == ()
    shutil.copy(train, val)
    (note,) = forms.opened(root, name, split).notes
    assert note.startswith(f"{name}: ")
    assert "equal bytes in another split, for example " in note


def test_a_split_that_is_a_link_to_another_is_refused(tmp_path: Path) -> None:
    name, root = made(tmp_path, "npy")
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")
    with pytest.raises(ValueError, match=r"val/image/0\.npy and train/image/0\.npy are one file"):
        forms.opened(root, name)


def test_a_frame_of_one_name_in_two_splits_is_refused(tmp_path: Path) -> None:
    name, root = made(tmp_path, "official")
    for part in ("leftImg8bit", "gtFine", "disparity"):
        shutil.copytree(root / part / "train/aachen", root / part / "val/aachen")
    expected = (
        r"val/aachen/aachen_000000_000019_leftImg8bit\.png and .*train/aachen.* are one frame"
    )
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=expected):
            forms.opened(root, name, split)
