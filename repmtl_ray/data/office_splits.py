"""Folders of photographs by domain and class without lists, and splits of this project's own.

Owns where domains and classes are, what counts as a photograph of a class, and the rule of the own
splits:

    office31     <domain>/images/<class>/<photograph>.jpg
    office_home  <domain>/<class>/<photograph>.jpg (the domain Real_World may be `Real World`)
    any others   <domain>/<class>/<photograph>.jpg (`image_folders`)

Lists that exist are read in `office_lists`.
"""

from __future__ import annotations

import functools
import os
import shutil
import unicodedata
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from repmtl_ray.data.files import FileIdentity, file_identity, listing, visible
from repmtl_ray.data.photographs import COUNTED, OTHER_SUFFIXES, SUFFIXES
from repmtl_ray.data_config import DOMAINS

SPLITS = ("train", "val", "test")
LISTS = "splits"
"""Folder of the lists, below the data set's folder."""
MAX_CLASSES = 65_536
LEAST_PHOTOGRAPHS = 5
"""Of a class in a domain: with fewer, int(0.2 n) leaves its validation split empty."""
MADE_LINE = (
    "# Made by repmtl_ray: of every class 60 % to train, 20 % to val, 20 % to test, drawn by the "
    "names of domain and class. Not a published split."
)
"""Begins every list that was made here."""


@dataclass(frozen=True, kw_only=True)
class OfficeSet:
    """A data set of domains that share their classes.

    Args:
        name: begins every error message.
        num_classes: that a domain can have.
        images: folder between domain and classes; empty for none.
        domains: that the data set has.
        list_folders: names that the folder of its lists may have inside `data_txt`.
    """

    name: str
    num_classes: int
    images: str
    domains: tuple[str, ...]
    list_folders: tuple[str, ...]

    @property
    def class_place(self) -> str:
        return "/".join(filter(None, ("<domain>", self.images, "<class>")))

    @property
    def layout(self) -> str:
        return f"{self.class_place}/<photograph>.jpg"


SETS = {
    "office31": OfficeSet(
        name="office31",
        num_classes=31,
        images="images",
        domains=DOMAINS["office31"],
        list_folders=("office-31", "office31", "office_31", "office"),
    ),
    "office_home": OfficeSet(
        name="office_home",
        num_classes=65,
        images="",
        domains=DOMAINS["office_home"],
        list_folders=("office-home", "office_home", "officehome"),
    ),
}


def set_of(name: str, root: Path, domains: Sequence[str]) -> OfficeSet:
    """Which data set a configuration names.

    Args:
        name: as in `DataConfig`.
        root: of the folders of "image_folders"; lists are made for every domain there, so that class
            ids do not depend on the domains that are asked for first.
        domains: that are asked for.
    """
    if name in SETS:
        return SETS[name]
    folders = visible(root) if root.is_dir() else []
    others = [
        folder.name.replace(" ", "_")
        for folder in folders
        if folder.is_dir()
        and folder.name not in (LISTS, "data_txt")
        and all(path.is_dir() for path in visible(folder))
    ]
    return OfficeSet(
        name=name,
        num_classes=MAX_CLASSES,
        images="",
        domains=tuple(dict.fromkeys((*domains, *sorted(others)))),
        list_folders=(),
    )


def spellings(name: str) -> tuple[str, ...]:
    """Of a domain, in names of folders and files: Office-Home's archive writes `Real World`."""
    return tuple(dict.fromkeys((name, name.replace("_", " "))))


def domain_folder(office: OfficeSet, root: Path, domain: str) -> Path:
    """The folder of a domain; the first spelling if there is none.

    Raises:
        ValueError: there is one in each spelling.
    """
    return only_one(office, [root / name for name in spellings(domain)], Path.is_dir)


def only_one(office: OfficeSet, paths: Sequence[Path], is_there: Callable[[Path], bool]) -> Path:
    there = [path for path in paths if is_there(path)]
    if len(there) > 1 and not there[0].samefile(there[1]):
        raise ValueError(
            f"{office.name}: there are both {there[0]} and {there[1]}; keep one of the two."
        )
    return there[0] if there else paths[0]


@functools.lru_cache(maxsize=4096)
def canonical(name: str) -> str:
    """Equal for names of classes that differ only in case, blanks, hyphens or Unicode form."""
    text = unicodedata.normalize("NFKC", name).casefold()
    return "_".join(text.replace("-", " ").replace("_", " ").split())


def make_lists(office: OfficeSet, root: Path, domains: Sequence[str]) -> None:
    """Writes lists for all domains of a folder without any, after every check.

    Args:
        office: which data set.
        root: its folder; gets the folder `splits`, complete or not at all.
        domains: that were asked for; the data set's other domains get lists too, if they exist.

    Raises:
        ValueError: photographs that do not count, two names of one file, a class with too few, class
            names that differ only in form, too many classes; a folder that cannot be written to.
    """
    photographs: dict[str, dict[Path, list[Path]]] = {}
    for domain in dict.fromkeys((*office.domains, *domains)):
        folder = domain_folder(office, root, domain) / office.images
        if folder.is_dir():
            _check_no_pictures(office, root, folder)
            photographs[domain] = {
                path: _photographs(office, root, path) for path in visible(folder) if path.is_dir()
            }
    class_ids = _class_ids(office, root, [path for part in photographs.values() for path in part])
    _check_one_name(
        office,
        root,
        [file for part in photographs.values() for files in part.values() for file in files],
    )
    texts = {
        f"{domain}_{split}.txt": "".join([f"{MADE_LINE}\n", *lines])
        for domain, part in photographs.items()
        for split, lines in _split(root, domain, part, class_ids).items()
    }
    _write_lists(office, root, texts)


def _photographs(office: OfficeSet, root: Path, folder: Path) -> list[Path]:
    """Of a class, by name.

    Raises:
        ValueError: pictures of a kind that does not count as photographs; too few.
    """
    name = folder.relative_to(root).as_posix()
    files = [path for path in visible(folder) if path.is_file()]
    photographs = [path for path in files if path.suffix.lower() in SUFFIXES]
    stems = {path.stem for path in photographs}  # 7.bmp beside 7.jpg was converted
    others = [
        path.name
        for path in files
        if path.suffix.lower() in OTHER_SUFFIXES and path.stem not in stems
    ]
    if others:
        raise ValueError(
            f"{office.name}: {name} holds {listing(others)}; only files whose names end in {COUNTED} "
            "count as photographs: convert or remove the others. No split lists were written."
        )
    if len(photographs) < LEAST_PHOTOGRAPHS:
        raise ValueError(
            f"{office.name}: {name} has {len(photographs)} photographs (files whose names end in "
            f"{COUNTED}); a class needs at least {LEAST_PHOTOGRAPHS} to be split into train, val "
            f"and test. Add photographs, put lists into {root / LISTS}, or remove the "
            "folder. No split lists were written."
        )
    return photographs


def _check_no_pictures(office: OfficeSet, root: Path, folder: Path) -> None:
    """Refuses pictures beside the class folders: their class is not known."""
    pictures = [
        path.name
        for path in visible(folder)
        if path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES) and path.is_file()
    ]
    if pictures:
        raise ValueError(
            f"{office.name}: {folder.relative_to(root).as_posix()} holds {listing(pictures)} outside "
            f"of any class; expected {office.layout}: move or remove them. No split lists were "
            "written."
        )


def _check_one_name(office: OfficeSet, root: Path, photographs: Sequence[Path]) -> None:
    """Refuses two names of one file: one could be drawn to train and the other to test."""
    known: dict[FileIdentity | None, Path] = {}
    for path in photographs:
        other = known.setdefault(file_identity(path), path)
        if other is not path:
            raise ValueError(
                f"{office.name}: {path.relative_to(root).as_posix()} and "
                f"{other.relative_to(root).as_posix()} are one file; a photograph is one sample of "
                "one split: remove one of the names. No split lists were written."
            )


def _class_ids(office: OfficeSet, root: Path, folders: Sequence[Path]) -> dict[str, int]:
    """Ids by the names of class folders, in the order of the names."""
    if not folders:
        raise ValueError(
            f"{office.name}: {root} has no folders {office.class_place}; expected {office.layout}."
        )
    first: dict[str, Path] = {}
    for folder in folders:
        other = first.setdefault(canonical(folder.name), folder)
        if other.name != folder.name:
            raise ValueError(
                f"{office.name}: the class folders {other.relative_to(root).as_posix()} and "
                f"{folder.relative_to(root).as_posix()} differ only in the form of the name; give "
                "one class one name in every domain. No split lists were written."
            )
    classes = sorted(folder.name for folder in first.values())
    if len(classes) > office.num_classes:
        where = office.class_place.removesuffix("/<class>")
        raise ValueError(
            f"{office.name}: {root} has {len(classes)} classes ({listing(classes)}), expected at "
            f"most {office.num_classes}; move the folders that are no class out of {where}."
        )
    return {name: label for label, name in enumerate(classes)}


def _split(
    root: Path, domain: str, photographs: dict[Path, list[Path]], class_ids: dict[str, int]
) -> dict[str, list[str]]:
    """The lines of a domain's three lists."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for folder, files in photographs.items():
        seed = [domain.replace(" ", "_"), folder.name]
        rng = np.random.default_rng([zlib.crc32(name.encode()) for name in seed])
        order = rng.permutation(len(files))
        ends = np.cumsum([int(0.6 * len(files)), int(0.2 * len(files))])
        for split, part in zip(SPLITS, np.split(order, ends), strict=True):
            for number in sorted(part):
                file = files[number].relative_to(root).as_posix()
                lines[split].append(f"{file} {class_ids[folder.name]}\n")
    return lines


def _write_lists(office: OfficeSet, root: Path, texts: dict[str, str]) -> None:
    target = root / LISTS
    draft = root / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir()
        for name, text in texts.items():
            (draft / name).write_text(text, "utf-8")
        try:
            draft.rename(target)
        except OSError:  # another process was faster, with the same lists
            if not any(target.glob("*_train.txt")):
                raise
    except OSError as error:
        raise ValueError(
            f"{office.name}: {root} has no split lists and new ones cannot be kept there ({error}); "
            f"put <domain>_{{train,val,test}}.txt into {target}, or make the folder writable."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
