"""Office-31: photographs of 31 kinds of things from three domains, each domain a task.

Owns the folder layout, the split lists and the decoding:

    <domain>/images/<class>/<photograph>.jpg
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

NUM_CLASSES = 31
SIZE = (224, 224)
SPLITS = ("train", "val", "test")
IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

_SUFFIXES = (".jpg", ".jpeg", ".png")
_LAYOUT = "<domain>/images/<class>/<photograph>.jpg"


@dataclass(frozen=True)
class _Entry:
    """A line of a split list."""

    file: str
    label: int
    where: str
    """The list and line, for error messages."""


def open_split(
    root: Path, split: str, *, domains: Sequence[str], size: tuple[int, int] | None
) -> tuple[Stream, ...]:
    """One split of every domain, in the order given; lists and file names checked.

    Args:
        root: folder that holds the domains.
        split: "train", "val" or "test".
        domains: names of folders in `root`; also the names of streams and tasks.
        size: (height, width) that photographs are resized to, bilinearly; None takes (224, 224).

    Raises:
        ValueError: a missing domain, list or photograph, a malformed line, an empty split, class
            ids that disagree; says which file and line, what was found and what to do.
    """
    _check_domains(root, domains)
    lists = _find_lists(root, domains)
    entries = {domain: _read_list(root, lists, domain, split) for domain in domains}
    _check_ids_agree([entry for domain in domains for entry in entries[domain]])
    return tuple(
        Stream(
            name=domain,
            kinds={domain: "class"},
            num_samples=len(entries[domain]),
            load=_Loader(
                root=root,
                task=domain,
                files=tuple(entry.file for entry in entries[domain]),
                labels=tuple(entry.label for entry in entries[domain]),
                size=SIZE if size is None else size,
            ),
            normalize=IMAGENET,
        )
        for domain in domains
    )


@dataclass(frozen=True)
class _Loader:
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
                f"office31: {file} cannot be decoded ({error}); copy the file again."
            ) from error
        return {
            SAMPLE_ID: np.array(index, dtype=np.int64),
            IMAGE: np.asarray(photograph, dtype=np.uint8),
            self.task: np.array(self.labels[index], dtype=np.int64),
        }


def _check_domains(root: Path, domains: Sequence[str]) -> None:
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"office31: {root} {found}; expected a folder with {_LAYOUT}. Set data.path to it."
        )
    for domain in domains:
        if (root / domain / "images").is_dir():
            continue
        where = root / domain if (root / domain).is_dir() else root
        holds = listing([path.name for path in where.iterdir()])
        raise ValueError(
            f"office31: {root} has no folder {domain}/images; expected {_LAYOUT}; {where} holds "
            f"{holds}."
        )


def _find_lists(root: Path, domains: Sequence[str]) -> Path:
    """The folder of the split lists; makes it if nobody has."""
    for folder in (root / "splits", root):
        with_lists = [
            domain
            for domain in domains
            if any((folder / f"{domain}_{split}.txt").is_file() for split in SPLITS)
        ]
        if not with_lists:
            continue
        for domain in domains:
            if domain not in with_lists:
                raise ValueError(
                    f"office31: {folder} has split lists for {', '.join(with_lists)} but none for "
                    f"{domain}; add {domain}_train.txt, {domain}_val.txt and {domain}_test.txt."
                )
        return folder
    _make_lists(root)
    return root / "splits"


def _read_list(root: Path, folder: Path, domain: str, split: str) -> list[_Entry]:
    path = folder / f"{domain}_{split}.txt"
    name = path.relative_to(root).as_posix()
    if not path.is_file():
        holds = listing([found.name for found in folder.glob("*.txt")])
        raise ValueError(f"office31: {name} is missing; {folder} holds {holds}.")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.lstrip("-").isdecimal():
            raise ValueError(f"office31: {where} is {line!r}; expected '<path> <class id>'.")
        if int(label) not in range(NUM_CLASSES):
            raise ValueError(
                f"office31: {where} has class id {label}; expected 0 to {NUM_CLASSES - 1}."
            )
        if not (root / file.strip()).is_file():
            raise ValueError(
                f"office31: {where} names {file.strip()}, which is not in {root}; restore the "
                "photograph or remove the line."
            )
        entries.append(_Entry(file.strip(), int(label), where))
    if not entries:
        raise ValueError(
            f"office31: {name} lists no photographs; expected lines of '<path> <class id>'."
        )
    return entries


def _check_ids_agree(entries: Sequence[_Entry]) -> None:
    """One class folder, one id: in every domain."""
    known: dict[str, _Entry] = {}
    for entry in entries:
        name = Path(entry.file).parent.name
        other = known.setdefault(name, entry)
        if other.label != entry.label:
            raise ValueError(
                f"office31: {entry.where} gives class {name} the id {entry.label}, but "
                f"{other.where} gives it {other.label}; take all lists from one source."
            )


def _make_lists(root: Path) -> None:
    """Splits all domains of a folder without lists; `splits` is then complete, or not there."""
    domains = sorted(path.parent for path in root.glob("*/images") if path.is_dir())
    classes = sorted({path.name for domain in domains for path in _class_folders(domain)})
    if len(classes) > NUM_CLASSES:
        raise ValueError(
            f"office31: {root} has {len(classes)} classes ({listing(classes)}), expected at most "
            f"{NUM_CLASSES}; move the folders that are no class out of <domain>/images."
        )
    draft = root / f".splits.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir()
        for domain in domains:
            lines = _split(root, domain, classes)
            for split in SPLITS:
                (draft / f"{domain.name}_{split}.txt").write_text("".join(lines[split]), "utf-8")
        try:
            draft.rename(root / "splits")
        except OSError:  # someone else was faster, with the same lists
            if not (root / "splits" / f"{domains[0].name}_train.txt").is_file():
                raise
    except OSError as error:
        raise ValueError(
            f"office31: {root} has no split lists and new ones cannot be kept there ({error}); put "
            f"<domain>_{{train,val,test}}.txt into {root / 'splits'}, or make the folder writable."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _class_folders(domain: Path) -> list[Path]:
    return sorted(path for path in (domain / "images").iterdir() if path.is_dir())


def _split(root: Path, domain: Path, classes: list[str]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for folder in _class_folders(domain):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        rng = np.random.default_rng(
            [zlib.crc32(domain.name.encode()), zlib.crc32(folder.name.encode())]
        )
        order = rng.permutation(len(files))
        ends = np.cumsum([int(0.6 * len(files)), int(0.2 * len(files))])
        for split, part in zip(SPLITS, np.split(order, ends), strict=True):
            for number in sorted(part):
                file = files[number].relative_to(root).as_posix()
                lines[split].append(f"{file} {classes.index(folder.name)}\n")
    return lines
