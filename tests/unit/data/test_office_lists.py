"""Which photograph is in which split, and of which class: lists that exist, and lists that are made."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from repmtl_ray.config import DataConfig
from repmtl_ray.data.office_splits import SETS, canonical
from repmtl_ray.data.sources import Stream, open_streams
from tests.helpers.layouts import make_office

CLASSES = {"mug": 0, "pen": 1}
NUM = {"amazon": 6, "dslr": 6}
LISTED = {"val": "frame_0000.jpg", "test": "frame_0001.jpg"}


def opened(root: Path, split: str = "train", name: str = "office31") -> tuple[Stream, ...]:
    domains = ("amazon", "dslr") if name == "office31" else ("Art", "Real_World")
    data = DataConfig(name=name, path=str(root), domains=domains, height=8, width=8)
    return open_streams(data, split)  # type: ignore[arg-type]


def with_lists(root: Path, **options: object) -> Path:
    return make_office(root, per_class=NUM, classes=CLASSES, **options)  # type: ignore[arg-type]


def without_lists(root: Path) -> Path:
    return with_lists(root, lists=None)


def change(root: Path, name: str, change_text: Callable[[str], str]) -> None:
    path = root / "splits" / name
    path.write_text(change_text(path.read_text()), encoding="utf-8")


def add(root: Path, name: str, line: str) -> None:
    change(root, name, lambda text: f"{text}{line}\n")


# A photograph is one sample


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    "spelling",
    [
        "amazon/images/mug/frame_0002.jpg",
        "./amazon/images/mug/frame_0002.jpg",
        "amazon//images/mug/frame_0002.jpg",
        "amazon/images/pen/../mug/frame_0002.jpg",
        "../data/amazon/images/mug/frame_0002.jpg",
        "amazon\\images\\mug\\frame_0002.jpg",
        "{root}/amazon/images/mug/frame_0002.jpg",
        "amazon/images/mug/link.jpg",
        "amazon/images/mug/hard_link.jpg",
        "amazon/images/pen/link.jpg",
    ],
)
@pytest.mark.parametrize("into", ["amazon_train.txt", "amazon_val.txt", "amazon_test.txt"])
def test_a_photograph_that_is_listed_twice_is_refused_however_it_is_spelled(
    tmp_path: Path, spelling: str, into: str, split: str
) -> None:
    root = with_lists(tmp_path / "data")
    (root / "amazon/images/mug/link.jpg").symlink_to("frame_0002.jpg")
    (root / "amazon/images/pen/link.jpg").symlink_to("../mug/frame_0002.jpg")
    os.link(root / "amazon/images/mug/frame_0002.jpg", root / "amazon/images/mug/hard_link.jpg")
    label = 1 if "pen/link" in spelling else 0
    add(root, into, f"{spelling.format(root=root)} {label}")
    with pytest.raises(ValueError, match=r"splits/amazon_\w+\.txt line \d+ names .*remove one of"):
        opened(root, split)


def test_one_file_in_two_domains_is_refused(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    (root / "dslr/images/mug/link.jpg").symlink_to("../../../amazon/images/mug/frame_0003.jpg")
    add(root, "dslr_test.txt", "dslr/images/mug/link.jpg 0")
    expected = r"dslr_test\.txt line 3 names dslr/images/mug/link\.jpg, the same file as amazon/.*3"
    with pytest.raises(ValueError, match=expected):
        opened(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_copy_in_another_split_is_noted_and_one_in_its_own_is_not(
    tmp_path: Path, split: str
) -> None:
    root = with_lists(tmp_path)
    copied = root / "amazon/images/mug/frame_0002.jpg"
    shutil.copy(copied, root / "amazon/images/mug/copy.jpg")
    add(root, "amazon_train.txt", "amazon/images/mug/copy.jpg 0")
    assert opened(root, split)[0].notes == ()
    shutil.copy(copied, root / "dslr/images/mug/other.jpg")
    add(root, "dslr_val.txt", "dslr/images/mug/other.jpg 0")
    (note,) = opened(root, split)[0].notes
    assert note == (
        "office31: 1 file has a copy with equal bytes in another split, for example "
        "amazon/images/mug/frame_0002.jpg (train) and dslr/images/mug/other.jpg (val); scores on "
        "them are too good."
    )


def test_files_of_equal_size_are_no_copies(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    for number, name in enumerate(("train.png", "val.png")):
        path = root / "amazon/images/mug" / name
        Image.new("L", (10, 10), number + 1).save(path)
        add(root, f"amazon_{path.stem}.txt", f"amazon/images/mug/{name} 0")
    sizes = {(root / f"amazon/images/mug/{name}.png").stat().st_size for name in ("train", "val")}
    assert len(sizes) == 1
    assert opened(root)[0].notes == ()


# Lists that contradict something


def test_a_list_of_another_domain_is_refused_in_every_split(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        root = with_lists(tmp_path / split)
        shutil.copy(root / f"splits/dslr_{split}.txt", root / f"splits/amazon_{split}.txt")
        expected = rf"amazon_{split}\.txt line 1 names dslr/.* is not a photograph of amazon"
        with pytest.raises(ValueError, match=expected):
            opened(root)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("domain", ["amazon", "dslr"])
def test_labels_that_contradict_the_other_lists_are_refused_in_every_split(
    tmp_path: Path, domain: str, split: str
) -> None:
    root = with_lists(tmp_path)

    def swap(text: str) -> str:
        return text.replace(".jpg 0", ".jpg 2").replace(".jpg 1", ".jpg 0").replace(" 2", " 1")

    change(root, f"{domain}_{split}.txt", swap)
    with pytest.raises(ValueError, match=r"gives class mug the id \d, but .* take all lists from"):
        opened(root)


def test_one_line_of_another_class_is_refused(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    change(
        root,
        "dslr_val.txt",
        lambda text: text.replace("mug/frame_0000.jpg 0", "mug/frame_0000.jpg 1"),
    )
    expected = r"dslr_val\.txt line 1 gives class mug the id 1, but .*amazon_train.* gives it 0"
    with pytest.raises(ValueError, match=expected):
        opened(root)


def test_ids_of_names_that_differ_in_form_must_agree(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    (root / "dslr/images/mug").rename(root / "dslr/images/Mug")
    for split in ("train", "val", "test"):
        change(root, f"dslr_{split}.txt", lambda text: text.replace("/mug/", "/Mug/"))
    assert set(opened(root)[1].classes or ()) == {0, 1}
    change(root, "dslr_train.txt", lambda text: text.replace(".jpg 0", ".jpg 5"))
    with pytest.raises(ValueError, match=r"gives class Mug the id 5, but .* gives mug 0"):
        opened(root)


def test_one_id_of_two_classes_is_noted(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    for path in (root / "splits").iterdir():
        change(root, path.name, lambda text: text.replace(".jpg 1", ".jpg 0"))
    assert opened(root)[0].notes == ("office31: the lists give the classes mug and pen one id, 0.",)


def test_a_class_that_is_never_trained_on_is_noted(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    change(root, "dslr_train.txt", lambda text: "\n".join(text.split("\n")[:4]) + "\n")
    expected = "office31: dslr has no training photographs of pen; other lists have."
    assert [stream.notes for stream in opened(root, "val")] == [(expected,), (expected,)]


# How lists are written


def as_utf_16(text: str) -> bytes:
    return text.encode("utf-16")


WRITTEN = {
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16 with a byte order mark": as_utf_16,
    "Windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "old Macintosh line ends": lambda text: text.replace("\n", "\r").encode(),
    "blank lines": lambda text: f"\n  \n{text}\n\n".encode(),
    "no last line end": lambda text: text.rstrip().encode(),
    "tabs": lambda text: text.replace(".jpg ", ".jpg\t").encode(),
    "blanks around": lambda text: "".join(f"  {line}  \n" for line in text.splitlines()).encode(),
    "Windows separators": lambda text: text.replace("/", "\\").encode(),
    "comments": lambda text: f"# a comment 3\n{text}".encode(),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_lists_are_read_however_an_editor_writes_them(tmp_path: Path, way: str) -> None:
    root = with_lists(tmp_path)
    plain = [stream.classes for stream in opened(root)]
    for path in (root / "splits").iterdir():
        path.write_bytes(WRITTEN[way](path.read_text()))
    streams = opened(root)
    assert [stream.classes for stream in streams] == plain
    assert streams[0].notes == ()
    assert int(streams[0].load(0)["amazon"]) == 0


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_blanks_and_accents_are_found_in_either_unicode_form(
    tmp_path: Path, form: str
) -> None:
    root = with_lists(tmp_path)
    name = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "cup of café")
    (root / "amazon/images/mug").rename(root / "amazon/images" / name)
    spelled = unicodedata.normalize(form, name)  # type: ignore[arg-type]
    for split in ("train", "val", "test"):
        change(root, f"amazon_{split}.txt", lambda text: text.replace("/mug/", f"/{spelled}/"))
    (root / "dslr/images/mug").rename(root / "dslr/images" / spelled)
    for split in ("train", "val", "test"):
        change(root, f"dslr_{split}.txt", lambda text: text.replace("/mug/", f"/{spelled}/"))
    for stream in opened(root):
        assert int(stream.load(0)[stream.name]) == 0


@pytest.mark.parametrize("name", ["._frame_0002.jpg", ".hidden/frame_0002.jpg", "Thumbs.db"])
def test_a_line_that_names_a_hidden_file_is_refused(tmp_path: Path, name: str) -> None:
    root = with_lists(tmp_path)
    add(root, "amazon_train.txt", f"amazon/images/mug/{name} 0")
    with pytest.raises(ValueError, match=r"amazon_train\.txt line 9 names .* hidden or left by"):
        opened(root)


# Where lists are


@pytest.mark.parametrize(
    "folder", ["splits", "data_txt", "data_txt/office-31", "data_txt/office31", ""]
)
def test_lists_are_found_where_people_have_them(tmp_path: Path, folder: str) -> None:
    with_lists(tmp_path, lists=folder)
    assert [stream.num_samples for stream in opened(tmp_path)] == [8, 8]
    assert opened(tmp_path)[0].notes == ()


@pytest.mark.parametrize("folder", ["lists", "amazon", "amazon/images", "data_txt/mine"])
def test_own_splits_do_not_take_the_place_of_lists_elsewhere(tmp_path: Path, folder: str) -> None:
    with_lists(tmp_path, lists=folder)
    with pytest.raises(
        ValueError, match=rf"{folder}/amazon_test\.txt looks like one; move the lis"
    ):
        opened(tmp_path)
    assert not (tmp_path / "splits").exists()


def test_lists_in_two_places_are_refused(tmp_path: Path) -> None:
    root = with_lists(tmp_path)
    shutil.copytree(root / "splits", root / "data_txt")
    with pytest.raises(ValueError, match=r"lists in .*splits and in .*data_txt, which may differ"):
        opened(root)


def test_a_domain_in_two_spellings_is_refused(tmp_path: Path) -> None:
    make_office(tmp_path, per_class={"Art": 5, "Real World": 5}, classes=CLASSES, images="")
    (tmp_path / "Real_World").mkdir()
    with pytest.raises(ValueError, match=r"both .*/Real_World and .*/Real World; keep one"):
        opened(tmp_path, name="office_home")


# Own splits


JUNK = (
    *(".DS_Store", "._frame_0000.jpg", "Thumbs.db", "desktop.ini", "notes.txt"),
    *("__MACOSX/frame_0000.jpg", ".ipynb_checkpoints/frame_0000-checkpoint.jpg", "@eaDir/x.jpg"),
)


def litter(root: Path) -> None:
    """What macOS, Windows, network disks and notebooks leave behind, in every folder."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in JUNK:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"\x00\x05\x16\x07")


@pytest.mark.parametrize("name", ["office31", "office_home"])
def test_what_systems_leave_behind_changes_no_split(tmp_path: Path, name: str) -> None:
    domains = {"office31": NUM, "office_home": {"Art": 6, "Real World": 6}}[name]
    classes = []
    for place in ("clean", "littered"):
        root = make_office(
            tmp_path / place,
            per_class=domains,
            classes=CLASSES,
            lists=None,
            images=SETS[name].images,
        )
        if place == "littered":
            litter(root)
        streams = opened(root, name=name)
        classes.append([stream.classes for stream in streams])
        assert all(streams[0].load(index)["image"].shape == (8, 8, 3) for index in range(6))
    assert classes[0] == classes[1] == [(0, 0, 0, 1, 1, 1)] * 2


def test_own_splits_are_noted_whenever_they_are_opened(tmp_path: Path) -> None:
    without_lists(tmp_path)
    for split in ("train", "val", "train"):
        for stream in opened(tmp_path, split):
            (note,) = stream.notes
            assert note.startswith("office31: the splits are this project's own")


def test_other_folders_and_domains_change_no_class_id(tmp_path: Path) -> None:
    without_lists(tmp_path)
    for name in ("backup/images/a_folder", "results/images/b"):
        (tmp_path / name).mkdir(parents=True)
    assert set(opened(tmp_path)[0].classes or ()) == {0, 1}
    assert (
        sorted(path.name[:4] for path in (tmp_path / "splits").iterdir())
        == ["amaz"] * 3 + ["dslr"] * 3
    )


def few(root: Path) -> None:
    for path in sorted((root / "dslr/images/pen").iterdir())[2:]:
        path.unlink()


def only(suffix: str) -> Callable[[Path], None]:
    def rename(root: Path) -> None:
        for path in (root / "amazon/images/mug").iterdir():
            path.rename(path.with_suffix(suffix))

    return rename


def _without_class_folders(root: Path) -> None:
    for domain in NUM:
        for name in CLASSES:
            shutil.rmtree(root / domain / "images" / name)


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "two photographs of a class": (
        few,
        r"dslr/images/pen has 2 photographs \(.*\.jpg, \.jpeg or \.png\); .* at least 5",
    ),
    "a class without photographs": (
        lambda root: (root / "dslr/images/cup").mkdir(),
        r"dslr/images/cup has 0 photographs",
    ),
    "photographs one folder too deep": (
        lambda root: shutil.move(root / "dslr/images/pen", root / "dslr/images/pens/pen"),
        r"dslr/images/pens has 0 photographs",
    ),
    "only .bmp": (
        only(".bmp"),
        r"mug holds frame_0000\.bmp, .*; only files .*\.jpg, \.jpeg or \.p",
    ),
    "only .TIFF": (only(".TIFF"), r"mug holds frame_0000\.TIFF, .*only files whose names end in"),
    "one .webp among others": (
        lambda root: (root / "dslr/images/pen/frame_0000.jpg").rename(
            root / "dslr/images/pen/0.webp"
        ),
        r"dslr/images/pen holds 0\.webp; only files",
    ),
    "no class folders": (
        _without_class_folders,
        r"has no folders <domain>/images/<class>",
    ),
    "a photograph outside of any class": (
        lambda root: shutil.copy(
            root / "dslr/images/pen/frame_0000.jpg", root / "dslr/images/x.JPG"
        ),
        r"dslr/images holds x\.JPG outside of any class",
    ),
    "another case": (
        lambda root: (root / "dslr/images/mug").rename(root / "dslr/images/Mug"),
        r"amazon/images/mug and dslr/images/Mug differ only in the form of the name",
    ),
    "another case in one domain": (
        lambda root: shutil.copytree(root / "dslr/images/pen", root / "dslr/images/PEN"),
        r"images/pen and dslr/images/PEN differ only in the form of the name",
    ),
    "a link to a class folder": (
        lambda root: (root / "dslr/images/cup").symlink_to("pen"),
        r"dslr/images/pen/frame_0000\.jpg and dslr/images/cup/frame_0000\.jpg are one file",
    ),
    "a link to a photograph": (
        lambda root: (root / "dslr/images/pen/a.jpg").symlink_to("frame_0001.jpg"),
        r"dslr/images/pen/frame_0001\.jpg and dslr/images/pen/a\.jpg are one file",
    ),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_own_lists_that_could_not_be_used_are_not_written(
    tmp_path: Path, case: str, split: str
) -> None:
    spoil, message = UNUSABLE[case]
    spoil(without_lists(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"office31: .*{message}"):
        opened(tmp_path, split)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_photographs_that_were_converted_leave_their_sources_behind(tmp_path: Path) -> None:
    only(".bmp")(without_lists(tmp_path))
    for path in list((tmp_path / "amazon/images/mug").iterdir()):
        shutil.copy(path, path.with_suffix(".jpg"))
    assert opened(tmp_path)[0].num_samples == 6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Mug", "mug"),
        ("back pack", "back_pack"),
        ("back-pack", "Back  Pack"),
        ("café", "cafe\u0301"),
        ("ﬁle", "file"),
    ],
)
def test_names_that_differ_only_in_form_are_one(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(("one", "other"), [("mug", "mugs"), ("pen1", "pen2"), ("cafe", "café")])
def test_names_that_differ_in_letters_are_two(one: str, other: str) -> None:
    assert canonical(one) != canonical(other)
