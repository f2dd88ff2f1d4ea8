"""The split lists of photographs by domain and class: found, read, checked, made where there are none.

Owns which photograph is in which split, and its class id. A list is
`<domain>_{train,val,test}.txt`; a line is `<path in the data set's folder> <class id>`; lines that
begin with # are comments.

All lists of all domains that are asked for are read and checked together, whichever split is
opened, so that no photograph is trained on in one split and evaluated on in another.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from repmtl_ray.data.files import (
    FileIdentity,
    SplitFile,
    copies_in_splits,
    file_identity,
    is_hidden,
    listing,
)
from repmtl_ray.data.office_splits import (
    LISTS,
    MADE_LINE,
    SPLITS,
    OfficeSet,
    canonical,
    make_lists,
    only_one,
    spellings,
)
from repmtl_ray.data.stream import MissingSplitError

_MADE_NOTE = (
    "the splits are this project's own (60, 20 and 20 % of every class), because the folder had no "
    "lists; scores cannot be compared with those on the published splits."
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of a split list.

    Args:
        split: of the list.
        file: path of the photograph below the data set's folder, as it is on the disk if it exists.
        label: class id.
        where: the list and line, for error messages.
        identity: of the file; None if it does not exist.
    """

    split: str
    file: str
    label: int
    where: str
    identity: FileIdentity | None

    @property
    def class_name(self) -> str:
        """Of the folder that holds the photograph."""
        return self.file.rpartition("/")[0].rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class SplitLists:
    """All lists of the domains that were asked for.

    Args:
        entries: by (domain, split), in the list's order; a split without a list is not there.
        notes: what a reader of results must know of the splits, one sentence each.
    """

    entries: Mapping[tuple[str, str], Sequence[Entry]]
    notes: tuple[str, ...]


def read_lists(office: OfficeSet, root: Path, split: str, domains: Sequence[str]) -> SplitLists:
    """Reads and checks the lists of all splits; makes them if the folder has none at all.

    Args:
        office: which data set.
        root: its folder, which holds the domains.
        split: the one that will be used: its lists and photographs must exist.
        domains: which domains, in order.

    Raises:
        ValueError: a list that is missing, malformed or empty, a photograph that is missing, hidden,
            of another domain, or listed twice, class ids that disagree; lists in two places; own
            lists that cannot be made. Says which file and line, what was found and what to do.
    """
    folder = _list_folder(office, root, domains)
    texts: dict[tuple[str, str], str] = {}
    entries: dict[tuple[str, str], list[Entry]] = {}
    for domain in domains:
        for name in SPLITS:
            path = _list_file(office, folder, domain, name)
            if path.is_file():
                texts[domain, name] = _text(office, root, path)
                entries[domain, name] = _entries(
                    office, root, path, domain, name, texts[domain, name]
                )
        _check_usable(
            office, root, _list_file(office, folder, domain, split), entries.get((domain, split))
        )
    everything = [entry for listed in entries.values() for entry in listed]
    _check_listed_once(office, everything)
    _check_class_ids(office, everything)
    notes = [_MADE_NOTE] if any(MADE_LINE in text for text in texts.values()) else []
    notes += [
        *_shared_ids(everything),
        *_untrained_classes(entries),
        *copies_in_splits(
            root,
            [
                SplitFile(entry.split, entry.file, entry.identity)
                for entry in everything
                if entry.identity is not None
            ],
        ),
    ]
    return SplitLists(entries=entries, notes=tuple(f"{office.name}: {note}" for note in notes))


def count_classes(office: OfficeSet, root: Path, domains: Sequence[str]) -> int:
    """One more than the largest class id in any list; makes the lists if the folder has none at all.

    Looks at no photograph. Lines that are no entries are left to `read_lists`, which refuses them.

    Raises:
        ValueError: as `read_lists` of lists that cannot be found, read or made; fewer than two classes.
    """
    folder = _list_folder(office, root, domains)
    largest = 0
    for domain in domains:
        for split in SPLITS:
            path = _list_file(office, folder, domain, split)
            text = _text(office, root, path) if path.is_file() else ""
            lines = [line.split() for line in text.split("\n") if not line.startswith("#")]
            ids = [words[-1] for words in lines if words]
            largest = max([largest, *(int(number) for number in ids if number.isdecimal())])
    if not 1 <= largest < office.num_classes:
        raise ValueError(
            f"{office.name}: the largest class id in the lists of {folder} is {largest}; expected 1 "
            f"to {office.num_classes - 1}: ids count from 0."
        )
    return largest + 1


# Finding and reading lists


def _list_file(office: OfficeSet, folder: Path, domain: str, split: str) -> Path:
    names = [f"{name}_{split}.txt" for name in spellings(domain)]
    return only_one(office, [folder / name for name in names], Path.is_file)


def _list_folder(office: OfficeSet, root: Path, domains: Sequence[str]) -> Path:
    """The folder of the lists; makes the lists if nobody has."""
    listed: dict[Path, list[str]] = {}
    places = (LISTS, "data_txt", *(f"data_txt/{name}" for name in office.list_folders), "")
    for folder in (root / place for place in places):
        with_lists = [
            domain
            for domain in domains
            if any(_list_file(office, folder, domain, split).is_file() for split in SPLITS)
        ]
        if with_lists:
            listed[folder] = with_lists
    if len(listed) > 1:
        raise ValueError(
            f"{office.name}: there are split lists in {' and in '.join(map(str, listed))}, which may "
            "differ; keep those of one folder."
        )
    for folder, with_lists in listed.items():
        for domain in domains:
            if domain not in with_lists:
                raise ValueError(
                    f"{office.name}: {folder} has split lists for {', '.join(with_lists)} but none "
                    f"for {domain}; add {domain}_train.txt, {domain}_val.txt and "
                    f"{domain}_test.txt."
                )
        return folder
    _refuse_lists_elsewhere(office, root)
    make_lists(office, root, domains)
    return root / LISTS


def _refuse_lists_elsewhere(office: OfficeSet, root: Path) -> None:
    """Own splits are no answer where lists exist, but not where they are looked for."""
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(root.glob(f"{pattern}.txt")):
            name = path.relative_to(root).as_posix()
            words = re.split(r"[\W_]+", path.stem.lower())
            if not is_hidden(name) and not set(words).isdisjoint(SPLITS):
                raise ValueError(
                    f"{office.name}: {root} has no split lists where they are expected, but {name} "
                    f"looks like one; move the lists to {root / LISTS} and name them "
                    "<domain>_{train,val,test}.txt, or move that file away."
                )


def _text(office: OfficeSet, root: Path, path: Path) -> str:
    """A list's text, with or without a byte order mark, in UTF-8 or (with one) in UTF-16."""
    try:
        data = path.read_bytes()
        is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        name = path.relative_to(root).as_posix()
        raise ValueError(f"{office.name}: {name} cannot be read ({error}).") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _entries(
    office: OfficeSet, root: Path, path: Path, domain: str, split: str, text: str
) -> list[Entry]:
    """What a list says, whether its photographs exist or not."""
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.strip().rsplit(None, 1)
        if not words or line.startswith("#"):
            continue
        where = f"{path.relative_to(root).as_posix()} line {number}"
        if len(words) < 2 or not words[1].lstrip("-").isdecimal():
            raise ValueError(f"{office.name}: {where} is {line!r}; expected '<path> <class id>'.")
        label = int(words[1])
        if label not in range(office.num_classes):
            raise ValueError(
                f"{office.name}: {where} has class id {label}; expected 0 to "
                f"{office.num_classes - 1}."
            )
        file, identity = _located(root, words[0])
        _check_file(office, domain, file, where)
        entries.append(Entry(split=split, file=file, label=label, where=where, identity=identity))
    return entries


def _located(root: Path, written: str) -> tuple[str, FileIdentity | None]:
    """A photograph's path below root and its identity, however a list spells the path.

    Returns:
        The spelling that exists; or the one that was most likely meant, and None.
    """
    plain: list[str] = []
    for text in dict.fromkeys((written, written.replace("\\", "/"))):
        domain, slash, rest = _below(root, text).partition("/")
        names = (*spellings(domain), domain.replace(" ", "_"))
        plain += [f"{name}{slash}{rest}" for name in dict.fromkeys(names)]
    for spell in (
        str,
        partial(unicodedata.normalize, "NFC"),
        partial(unicodedata.normalize, "NFD"),
    ):
        for file in map(spell, plain):
            identity = file_identity(root / file)
            if identity is not None:
                return file, identity
    return plain[0], None


def _below(root: Path, text: str) -> str:
    """A path as it is below root; an absolute path, or one that leaves root, may not be."""
    prefix = f"{root}/"
    path = os.path.normpath(text if text.startswith("/") else prefix + text)
    if not path.startswith(prefix):  # by another link to the folder, perhaps
        path = str(Path(path).parent.resolve() / Path(path).name)
    if path.startswith(prefix):
        return path.removeprefix(prefix)
    return text


def _check_file(office: OfficeSet, domain: str, file: str, where: str) -> None:
    folder, _, rest = file.partition("/")
    if is_hidden(rest):
        raise ValueError(
            f"{office.name}: {where} names {file}, which is hidden or left by the system and no "
            "photograph; remove the line."
        )
    if folder not in spellings(domain):
        raise ValueError(
            f"{office.name}: {where} names {file}, which is not a photograph of {domain}; expected "
            f"paths that begin with {domain}/. Take the list that belongs to {domain}."
        )


# Checks of all lists together


def _check_usable(
    office: OfficeSet, root: Path, path: Path, entries: Sequence[Entry] | None
) -> None:
    """The list that will be used exists, has lines, and its photographs exist."""
    name = path.relative_to(root).as_posix()
    if entries is None:
        holds = listing(file.name for file in path.parent.glob("*.txt"))
        raise MissingSplitError(f"{office.name}: {name} is missing; {path.parent} holds {holds}.")
    if not entries:
        raise ValueError(
            f"{office.name}: {name} lists no photographs; expected lines of '<path> <class id>'."
        )
    for entry in entries:
        if entry.identity is None:
            raise ValueError(
                f"{office.name}: {entry.where} names {entry.file}, which is not in {root}; restore "
                "the photograph or remove the line."
            )


def _check_listed_once(office: OfficeSet, entries: Sequence[Entry]) -> None:
    """A photograph is one sample of one split of one domain, whatever its path is."""
    known: dict[FileIdentity | str, Entry] = {}
    for entry in entries:
        other = known.setdefault(entry.identity or entry.file, entry)
        if other is not entry:
            same = "as" if entry.file == other.file else f"the same file as {other.file}, which"
            does = "does" if entry.file == other.file else "names"
            raise ValueError(
                f"{office.name}: {entry.where} names {entry.file}, {same} {other.where} {does}; a "
                "photograph is one sample of one split: remove one of the lines."
            )


def _check_class_ids(office: OfficeSet, entries: Sequence[Entry]) -> None:
    """A class has one id, in every domain and split, however its name is spelled."""
    known: dict[str, Entry] = {}
    for entry in entries:
        other = known.setdefault(canonical(entry.class_name), entry)
        if other.label != entry.label:
            another = "it" if other.class_name == entry.class_name else other.class_name
            raise ValueError(
                f"{office.name}: {entry.where} gives class {entry.class_name} the id {entry.label}, "
                f"but {other.where} gives {another} {other.label}; take all lists from one source."
            )


def _shared_ids(entries: Sequence[Entry]) -> list[str]:
    """A note on every id that several classes have."""
    names: dict[int, dict[str, str]] = {}
    for entry in entries:
        names.setdefault(entry.label, {}).setdefault(canonical(entry.class_name), entry.class_name)
    return [
        f"the lists give the classes {' and '.join(sorted(spelled.values()))} one id, {label}."
        for label, spelled in sorted(names.items())
        if len(spelled) > 1
    ]


def _untrained_classes(entries: Mapping[tuple[str, str], Sequence[Entry]]) -> list[str]:
    """A note on every domain whose training list lacks a class that another list has."""
    names = {entry.label: entry.class_name for listed in entries.values() for entry in listed}
    notes = []
    for (domain, split), listed in entries.items():
        missing = names.keys() - {entry.label for entry in listed}
        if split == "train" and missing:
            lacking = listing(names[label] for label in missing)
            notes.append(f"{domain} has no training photographs of {lacking}; other lists have.")
    return notes
