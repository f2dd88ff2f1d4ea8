"""Office-31 and Office-Home: photographs of things from several domains, each domain a task.

Owns the folder layouts, the split lists and the decoding:

    office31     <domain>/images/<class>/<photograph>.jpg
    office_home  <domain>/<class>/<photograph>.jpg (the domain Real_World may be `Real World`)
    splits/<domain>_{train,val,test}.txt, or the same files beside the domains;
        a line is `<path in the data set's folder> <class id>`

The lists decide the class ids (in the published ones they are not alphabetical). A folder without
any list gets them once, for all its domains: classes by name; of a class's n photographs int(0.6 n)
to train, int(0.2 n) to val, the rest to test; always the same photographs, whoever does it.
"""

from __future__ import annotations

import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.npy import listing
from repmtl_ray.data.stream import Normalization, Sample, Stream

SIZE = (224, 224)
SPLITS = ("train", "val", "test")
IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, kw_only=True)
class OfficeSet:
    """One of the two data sets.

    Args:
        name: begins every error message.
        num_classes: that a domain can have.
        images: folder between domain and classes; empty for none.
    """

    name: str
    num_classes: int
    images: str

    @property
    def layout(self) -> str:
        return "/".join(filter(None, ("<domain>", self.images, "<class>", "<photograph>.jpg")))


SETS = {
    "office31": OfficeSet(name="office31", num_classes=31, images="images"),
    "office_home": OfficeSet(name="office_home", num_classes=65, images=""),
}


@dataclass(frozen=True)
class _Entry:
    """A line of a split list."""

    file: str
    label: int
    where: str
    """The list and line, for error messages."""


def open_split(
    office: OfficeSet,
    root: Path,
    split: str,
    *,
    domains: Sequence[str],
    size: tuple[int, int] | None,
) -> tuple[Stream, ...]:
    """One split of every domain, in the order given; lists and file names checked.

    Args:
        office: which of `SETS`.
        root: folder that holds the domains.
        split: "train", "val" or "test".
        domains: names of folders in `root` ("_" also finds " "); also of streams and tasks.
        size: (height, width) that photographs are resized to, bilinearly; None takes (224, 224).

    Raises:
        ValueError: a missing domain, list or photograph, a malformed line, an empty split, a
            photograph that is listed twice, class ids that disagree; says which file and line, what
            was found and what to do.
    """
    _check_domains(office, root, domains)
    lists = _find_lists(office, root, domains)
    entries = {domain: _read_list(office, root, lists, domain, split) for domain in domains}
    _check_ids_agree(office, [entry for domain in domains for entry in entries[domain]])
    return tuple(
        Stream(
            name=domain,
            kinds={domain: "class"},
            num_samples=len(entries[domain]),
            load=_Loader(
                dataset=office.name,
                root=root,
                task=domain,
                files=tuple(entry.file for entry in entries[domain]),
                labels=tuple(entry.label for entry in entries[domain]),
                size=SIZE if size is None else size,
            ),
            normalize=IMAGENET,
            classes=tuple(entry.label for entry in entries[domain]),
        )
        for domain in domains
    )


@dataclass(frozen=True)
class _Loader:
    dataset: str
    root: Path
    task: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    size: tuple[int, int]

    def __call__(self, index: int) -> Sample:
        file = self.files[index]
        try:
            with Image.open(self.root / file) as stored:
                photograph = stored.convert("RGB").resize(
                    self.size[::-1], Image.Resampling.BILINEAR
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.dataset}: {file} cannot be decoded ({error}); copy the file again."
            ) from error
        return {
            SAMPLE_ID: np.array(index, dtype=np.int64),
            IMAGE: np.asarray(photograph, dtype=np.uint8),
            self.task: np.array(self.labels[index], dtype=np.int64),
        }


def _spellings(name: str) -> tuple[str, ...]:
    """Of a domain, in names of folders and files: Office-Home's archive writes `Real World`."""
    return tuple(dict.fromkeys((name, name.replace("_", " "))))


def _domain_folder(root: Path, domain: str) -> Path:
    """Where a domain is; the first spelling if it is nowhere."""
    folders = [root / name for name in _spellings(domain)]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _list_file(folder: Path, domain: str, split: str) -> Path:
    files = [folder / f"{name}_{split}.txt" for name in _spellings(domain)]
    return next((file for file in files if file.is_file()), files[0])


def _photograph(root: Path, file: str) -> str | None:
    """Its path below root; None if it is not there."""
    domain, slash, rest = file.partition("/")
    for name in (*_spellings(domain), domain.replace(" ", "_")):
        if (root / f"{name}{slash}{rest}").is_file():
            return f"{name}{slash}{rest}"
    return None


def _check_domains(office: OfficeSet, root: Path, domains: Sequence[str]) -> None:
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{office.name}: {root} {found}; expected a folder with {office.layout}. Set data.path "
            "to it."
        )
    for domain in domains:
        folder = _domain_folder(root, domain)
        if (folder / office.images).is_dir():
            continue
        where = folder if folder.is_dir() else root
        holds = listing([path.name for path in where.iterdir()])
        missing = "/".join(filter(None, (domain, office.images)))
        raise ValueError(
            f"{office.name}: {root} has no folder {missing}; expected {office.layout}; {where} "
            f"holds {holds}."
        )


def _find_lists(office: OfficeSet, root: Path, domains: Sequence[str]) -> Path:
    """The folder of the split lists; makes it if nobody has."""
    for folder in (root / "splits", root):
        with_lists = [
            domain
            for domain in domains
            if any(_list_file(folder, domain, split).is_file() for split in SPLITS)
        ]
        if not with_lists:
            continue
        for domain in domains:
            if domain not in with_lists:
                raise ValueError(
                    f"{office.name}: {folder} has split lists for {', '.join(with_lists)} but none "
                    f"for {domain}; add {domain}_train.txt, {domain}_val.txt and "
                    f"{domain}_test.txt."
                )
        return folder
    _make_lists(office, root)
    return root / "splits"


def _read_list(
    office: OfficeSet, root: Path, folder: Path, domain: str, split: str
) -> list[_Entry]:
    path = _list_file(folder, domain, split)
    name = path.relative_to(root).as_posix()
    if not path.is_file():
        holds = listing([found.name for found in folder.glob("*.txt")])
        raise ValueError(f"{office.name}: {name} is missing; {folder} holds {holds}.")
    entries = []
    for entry in _lines(office, path, name):
        file = _photograph(root, entry.file)
        if file is None:
            raise ValueError(
                f"{office.name}: {entry.where} names {entry.file}, which is not in {root}; restore "
                "the photograph or remove the line."
            )
        entries.append(_Entry(file, entry.label, entry.where))
    if not entries:
        raise ValueError(
            f"{office.name}: {name} lists no photographs; expected lines of '<path> <class id>'."
        )
    others = [_list_file(folder, domain, other) for other in SPLITS if other != split]
    listed = [
        entry
        for other in others
        if other.is_file()
        for entry in _lines(office, other, other.relative_to(root).as_posix())
    ]
    _check_listed_once(office, root, [*entries, *listed])
    return entries


def _lines(office: OfficeSet, path: Path, name: str) -> list[_Entry]:
    """What a list says, whether its photographs are there or not."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{office.name}: {name} cannot be read ({error}).") from error
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.lstrip("-").isdecimal():
            raise ValueError(f"{office.name}: {where} is {line!r}; expected '<path> <class id>'.")
        if int(label) not in range(office.num_classes):
            raise ValueError(
                f"{office.name}: {where} has class id {label}; expected 0 to "
                f"{office.num_classes - 1}."
            )
        entries.append(_Entry(file.strip(), int(label), where))
    return entries


def _check_listed_once(office: OfficeSet, root: Path, entries: Sequence[_Entry]) -> None:
    """In all lists of a domain: a photograph is one sample of one split."""
    known: dict[str, _Entry] = {}
    for entry in entries:
        other = known.setdefault(_photograph(root, entry.file) or entry.file, entry)
        if other is not entry:
            raise ValueError(
                f"{office.name}: {entry.where} names {entry.file}, as {other.where} does; a "
                "photograph is one sample of one split: remove one of the lines."
            )


def _check_ids_agree(office: OfficeSet, entries: Sequence[_Entry]) -> None:
    """One class folder, one id: in every domain."""
    known: dict[str, _Entry] = {}
    for entry in entries:
        name = Path(entry.file).parent.name
        other = known.setdefault(name, entry)
        if other.label != entry.label:
            raise ValueError(
                f"{office.name}: {entry.where} gives class {name} the id {entry.label}, but "
                f"{other.where} gives it {other.label}; take all lists from one source."
            )


def _make_lists(office: OfficeSet, root: Path) -> None:
    """Splits all domains of a folder without lists; `splits` is then complete, or not there."""
    domains = sorted(
        path
        for path in root.iterdir()
        if not path.name.startswith(".")
        and path.name != "splits"
        and (path / office.images).is_dir()
        and _class_folders(office, path)
    )
    names = {path.name for domain in domains for path in _class_folders(office, domain)}
    classes = sorted(names)
    if len(classes) > office.num_classes:
        where = "/".join(filter(None, ("<domain>", office.images)))
        raise ValueError(
            f"{office.name}: {root} has {len(classes)} classes ({listing(classes)}), expected at "
            f"most {office.num_classes}; move the folders that are no class out of {where}."
        )
    draft = root / f".splits.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir()
        for domain in domains:
            name, lines = domain.name.replace(" ", "_"), _split(office, root, domain, classes)
            for split in SPLITS:
                (draft / f"{name}_{split}.txt").write_text("".join(lines[split]), "utf-8")
        try:
            draft.rename(root / "splits")
        except OSError:  # someone else was faster, with the same lists
            if not any((root / "splits").glob("*_train.txt")):
                raise
    except OSError as error:
        raise ValueError(
            f"{office.name}: {root} has no split lists and new ones cannot be kept there ({error}); "
            f"put <domain>_{{train,val,test}}.txt into {root / 'splits'}, or make the folder "
            "writable."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _class_folders(office: OfficeSet, domain: Path) -> list[Path]:
    return sorted(path for path in (domain / office.images).iterdir() if path.is_dir())


def _split(office: OfficeSet, root: Path, domain: Path, classes: list[str]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for folder in _class_folders(office, domain):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        seed = [domain.name.replace(" ", "_"), folder.name]
        rng = np.random.default_rng([zlib.crc32(name.encode()) for name in seed])
        order = rng.permutation(len(files))
        ends = np.cumsum([int(0.6 * len(files)), int(0.2 * len(files))])
        for split, part in zip(SPLITS, np.split(order, ends), strict=True):
            for number in sorted(part):
                file = files[number].relative_to(root).as_posix()
                lines[split].append(f"{file} {classes.index(folder.name)}\n")
    return lines
