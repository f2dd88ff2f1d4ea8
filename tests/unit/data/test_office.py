from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repmtl_ray.config import DataConfig
from repmtl_ray.data.office_splits import MADE_LINE
from repmtl_ray.data.sources import Stream, image_size, open_streams, tasks_of
from repmtl_ray.tasks import Classification
from tests.helpers.layouts import make_office

CLASSES = {"mug": 0, "bike": 4, "back_pack": 30}
PER_CLASS = {"amazon": 6, "dslr": 4}


def make(root: Path, **options: Any) -> Path:
    return make_office(root, **{"per_class": PER_CLASS, "classes": CLASSES, **options})


def opened(
    root: Path, split: str = "train", domains: tuple[str, ...] = ("amazon", "dslr"), **sizes: Any
) -> tuple[Stream, ...]:
    data = DataConfig(name="office31", path=str(root), domains=tuple(domains), **sizes)
    return open_streams(data, split)


@pytest.mark.parametrize("lists", ["splits", ""])
def test_samples_follow_the_lists(tmp_path: Path, lists: str) -> None:
    make(tmp_path, lists=lists)
    for split, counts in (("train", (12, 6)), ("val", (3, 3)), ("test", (3, 3))):
        streams = opened(tmp_path, split)
        assert [stream.name for stream in streams] == ["amazon", "dslr"]
        assert tuple(stream.num_samples for stream in streams) == counts
    (dslr,) = opened(tmp_path, "val", ["dslr"])
    assert dslr.tasks == ("dslr",)
    assert [int(dslr.load(index)["dslr"]) for index in range(3)] == [0, 4, 30]


def test_photographs_are_decoded_and_resized(tmp_path: Path) -> None:
    make(tmp_path)
    (stream,) = opened(tmp_path, "val", ["amazon"])
    sample = stream.load(1)
    with Image.open(tmp_path / "amazon/images/bike/frame_0000.jpg") as stored:
        expected = np.asarray(stored.resize((224, 224), Image.Resampling.BILINEAR))
    assert sample["image"].dtype == np.uint8
    np.testing.assert_array_equal(sample["image"], expected)
    assert (sample["sample_id"], sample["amazon"]) == (1, 4)
    assert sample["amazon"].dtype == np.int64
    assert stream.normalize == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    (small,) = opened(tmp_path, "val", ["amazon"], height=16, width=24)
    assert pickle.loads(pickle.dumps(small)).load(0)["image"].shape == (16, 24, 3)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png")])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    make(tmp_path)
    file = tmp_path / f"amazon/images/mug/other.{suffix}"
    Image.new("RGB", (10, 10), (200, 100, 50)).convert(mode).save(file)
    (tmp_path / "splits/amazon_val.txt").write_text(f"{file.relative_to(tmp_path)} 0\n")
    (stream,) = opened(tmp_path, "val", ["amazon"])
    assert stream.load(0)["image"].shape == (224, 224, 3)


def test_tasks_and_image_size() -> None:
    data = DataConfig(name="office31", path="/nowhere", domains=("webcam", "amazon"))
    assert tasks_of(data) == (
        Classification(name="webcam", num_classes=31),
        Classification(name="amazon", num_classes=31),
    )
    assert image_size(data) == (224, 224)


@pytest.mark.parametrize(("num", "counts"), [(7, (4, 1, 2)), (10, (6, 2, 2)), (5, (3, 1, 1))])
def test_lists_are_made_once_by_the_published_rule(
    tmp_path: Path, num: int, counts: tuple[int, ...]
) -> None:
    make(tmp_path, per_class={"amazon": num, "webcam": 10}, lists=None)
    splits = {split: opened(tmp_path, split, ["webcam"])[0] for split in ("train", "val", "test")}
    assert [stream.num_samples for stream in splits.values()] == [18, 6, 6]
    # All domains were split, with the same ids in each: names in alphabetical order.
    lines = {
        split: (tmp_path / f"splits/amazon_{split}.txt").read_text().splitlines()
        for split in splits
    }
    assert all(entries.pop(0) == MADE_LINE for entries in lines.values())
    assert [len(entries) for entries in lines.values()] == [3 * count for count in counts]
    for name, label in (("back_pack", 0), ("bike", 1), ("mug", 2)):
        files = [entry for entries in lines.values() for entry in entries if f"/{name}/" in entry]
        assert len(set(files)) == num
        assert all(entry.endswith(f" {label}") for entry in files)
        assert [sum(f"/{name}/" in e for e in entries) for entries in lines.values()] == [*counts]


def test_made_lists_do_not_depend_on_where_or_when(tmp_path: Path) -> None:
    for name in ("one", "two"):
        opened(make(tmp_path / name, lists=None, per_class={"amazon": 6, "dslr": 5}))
    one, two = (
        {file.name: file.read_text() for file in (tmp_path / name / "splits").iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == 6
    assert not list((tmp_path / "one").glob(".splits*"))


def _edit(name: str, old: str, new: str) -> Callable[..., Any]:
    def spoil(root: Path) -> None:
        path = root / "splits" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


BROKEN = {
    "no such domain": (
        lambda root: (root / "dslr").rename(root / "DSLR"),
        r"office31: .* has no folder dslr/images; .* holds DSLR, amazon, splits",
    ),
    "no images folder": (
        lambda root: (root / "dslr/images").rename(root / "dslr/photos"),
        r"has no folder dslr/images; expected <domain>/images/<class>/.* holds photos",
    ),
    "missing photograph": (
        lambda root: (root / "amazon/images/mug/frame_0003.jpg").unlink(),
        r"splits/amazon_train.txt line 2 names amazon/images/mug/frame_0003\.jpg, which is not in",
    ),
    "no class id": (
        _edit("amazon_train.txt", "0003.jpg 0", "0003.jpg"),
        r"splits/amazon_train\.txt line 2 is '.*frame_0003\.jpg'; expected '<path> <class id>'",
    ),
    "class id out of range": (
        _edit("dslr_train.txt", ".jpg 30", ".jpg 31"),
        r"splits/dslr_train\.txt line 5 has class id 31; expected 0 to 30",
    ),
    "negative class id": (
        _edit("dslr_train.txt", ".jpg 30", ".jpg -1"),
        r"splits/dslr_train\.txt line 5 has class id -1; expected 0 to 30",
    ),
    "ids of another source": (
        _edit("dslr_train.txt", ".jpg 4", ".jpg 5"),
        r"dslr_train\.txt line 3 gives class bike the id 5, but splits/amazon_train\.txt line 5 "
        r"gives it 4; take all lists from one source",
    ),
    "empty list": (
        lambda root: (root / "splits/dslr_train.txt").write_text("\n\n"),
        r"splits/dslr_train\.txt lists no photographs",
    ),
    "missing list": (
        lambda root: (root / "splits/dslr_train.txt").unlink(),
        r"splits/dslr_train\.txt is missing; .*splits holds amazon_test\.txt, amazon_train\.txt",
    ),
    "one photograph twice": (
        _edit("amazon_train.txt", "mug/frame_0003.jpg", "mug/frame_0002.jpg"),
        r"splits/amazon_train\.txt line 2 names amazon/images/mug/frame_0002\.jpg, as "
        r"splits/amazon_train\.txt line 1 does; a photograph is one sample of one split",
    ),
    "a photograph of another split": (
        _edit("amazon_train.txt", "mug/frame_0002.jpg", "mug/frame_0000.jpg"),
        r"splits/amazon_val\.txt line 1 names amazon/images/mug/frame_0000\.jpg, as "
        r"splits/amazon_train\.txt line 1 does",
    ),
    "a folder in place of a list": (
        lambda root: [
            (root / "splits/dslr_train.txt").unlink(),
            (root / "splits/dslr_train.txt").mkdir(),
        ],
        r"splits/dslr_train\.txt is missing; .*splits holds amazon_test\.txt",
    ),
    "a list that is no text": (
        lambda root: (root / "splits/dslr_train.txt").write_bytes(b"\xff\xfe\x00"),
        r"office31: splits/dslr_train\.txt cannot be read \(.*codec can't decode",
    ),
    "no lists for a domain": (
        lambda root: [(root / f"splits/dslr_{s}.txt").unlink() for s in ("train", "val", "test")],
        r"splits has split lists for amazon but none for dslr; add dslr_train\.txt",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_layout_is_refused_when_it_is_opened(tmp_path: Path, case: str) -> None:
    spoil, message = BROKEN[case]
    spoil(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"office31: .*/nowhere does not exist; .*data\.path"):
        opened(tmp_path / "nowhere")


def test_a_broken_photograph_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    files = [tmp_path / f"amazon/images/{name}/frame_0000.jpg" for name in ("mug", "bike")]
    files[0].write_bytes(files[0].read_bytes()[:-200])
    files[1].write_text("<html>not found</html>")
    (stream,) = opened(tmp_path, "val", ["amazon"])
    with pytest.raises(ValueError, match=r"images/mug/frame_0000\.jpg cannot be decoded .*trunc"):
        stream.load(0)
    with pytest.raises(ValueError, match=r"images/bike/frame_0000\.jpg cannot be decoded \(cannot"):
        stream.load(1)


def test_lists_that_cannot_be_kept_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, lists=None, per_class={"amazon": 6, "dslr": 5})
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith(".splits"):
            raise PermissionError(13, "Permission denied")
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"no split lists .*Permission denied.* make the folder"):
        opened(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amazon", "dslr"]


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    make(tmp_path, lists=None, classes={f"class_{i:02}": 0 for i in range(32)}, per_class={"a": 5})
    with pytest.raises(ValueError, match=r"has 32 classes \(class_00, .*and 24 more\), expected"):
        opened(tmp_path, domains=["a"])


# Office-Home

HOME = {"Art": 6, "Real World": 5}
HOME_CLASSES = {"Alarm_Clock": 3, "Bed": 64}


def home(root: Path, split: str = "train", **options: Any) -> tuple[Stream, ...]:
    options = {"domains": ("Art", "Real_World"), **options}
    return open_streams(DataConfig(name="office_home", path=str(root), **options), split)


def test_office_home_has_four_domains_of_65_classes() -> None:
    data = DataConfig(name="office_home", path="/nowhere")
    assert tasks_of(data) == tuple(
        Classification(name=name, num_classes=65)
        for name in ("Art", "Clipart", "Product", "Real_World")
    )


@pytest.mark.parametrize("listed", ["Real World", "Real_World"])
@pytest.mark.parametrize("folder", ["Real World", "Real_World"])
def test_real_world_is_found_in_both_spellings(tmp_path: Path, folder: str, listed: str) -> None:
    make_office(tmp_path, per_class=HOME, classes=HOME_CLASSES, images="")
    (tmp_path / "Real World").rename(tmp_path / folder)
    for file in (tmp_path / "splits").glob("Real World*"):
        text = file.read_text().replace("Real World/", f"{listed}/")
        file.unlink()
        file.with_name(file.name.replace("Real World", listed)).write_text(text)
    _, stream = home(tmp_path)
    assert (stream.name, stream.tasks, stream.num_samples) == ("Real_World", ("Real_World",), 6)
    assert stream.classes == (3, 3, 3, 64, 64, 64)
    assert [int(stream.load(index)["Real_World"]) for index in range(6)] == list(stream.classes)


def test_office_home_without_lists_gets_them_in_one_spelling(tmp_path: Path) -> None:
    make_office(tmp_path, per_class=HOME, classes=HOME_CLASSES, images="", lists=None)
    (tmp_path / "ImageInfo.csv").write_text("of the archive")
    counts = [[s.num_samples for s in home(tmp_path, split)] for split in ("train", "val", "test")]
    assert counts == [[6, 6], [2, 2], [4, 2]]
    names = sorted(file.name for file in (tmp_path / "splits").iterdir())
    assert names == [
        f"{d}_{s}.txt" for d in ("Art", "Real_World") for s in ("test", "train", "val")
    ]
    assert "Real World/Bed/" in (tmp_path / "splits/Real_World_train.txt").read_text()


def test_office_homes_folders_are_checked_by_its_own_layout(tmp_path: Path) -> None:
    make_office(tmp_path, per_class=HOME, classes={"Bed": 65}, images="")
    with pytest.raises(
        ValueError, match=r"office_home: splits/Art_train\.txt line 1 has class id 65"
    ):
        home(tmp_path)
    expected = (
        r"no folder Clipart; expected <domain>/<class>/<photograph>\.jpg; .* holds Art, Real W"
    )
    with pytest.raises(ValueError, match=expected):
        home(tmp_path, domains=("Clipart",))


def test_streams_know_the_classes_that_their_samples_have(tmp_path: Path) -> None:
    make(tmp_path)
    for stream in opened(tmp_path):
        loaded = [int(stream.load(index)[stream.name]) for index in range(stream.num_samples)]
        assert list(stream.classes) == loaded
