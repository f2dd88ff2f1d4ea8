"""Photographs of things from several domains, each domain a task: Office-31, Office-Home, others.

Owns opening a split, and the samples: decoded, resized, labelled. Which photographs they are is in
the split lists (`office_lists`), or in splits of this project's own (`office_splits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from repmtl_ray.data.columns import IMAGE, SAMPLE_ID
from repmtl_ray.data.files import listing, visible
from repmtl_ray.data.office_lists import count_classes, read_lists
from repmtl_ray.data.office_splits import SETS, OfficeSet, domain_folder, set_of
from repmtl_ray.data.photographs import decode_photograph
from repmtl_ray.data.stream import Normalization, Sample, Stream

__all__ = ["IMAGENET", "SETS", "SIZE", "num_classes", "open_split", "set_of"]

SIZE = (224, 224)
IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


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
        office: which data set (`set_of`).
        root: folder that holds the domains.
        split: "train", "val" or "test".
        domains: names of folders in `root` ("_" also finds " "); also of streams and tasks.
        size: (height, width) that photographs are resized to, bilinearly; None takes (224, 224).

    Raises:
        ValueError: a missing domain, list or photograph, a malformed line, an empty split, a
            photograph that is listed twice, class ids that disagree; own splits that cannot be
            made. Says which file and line, what was found and what to do.
    """
    _check_domains(office, root, domains)
    lists = read_lists(office, root, split, domains)
    entries = {domain: lists.entries[domain, split] for domain in domains}
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
            notes=lists.notes,
            image_size=SIZE if size is None else size,
        )
        for domain in domains
    )


def num_classes(office: OfficeSet, root: Path, domains: Sequence[str]) -> int:
    """How many classes a domain can have; of "image_folders" by the largest class id of the lists.

    Raises:
        ValueError: a missing domain, or lists that cannot be found, read or made.
    """
    if office.name in SETS:
        return office.num_classes
    _check_domains(office, root, domains)
    return count_classes(office, root, domains)


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
        photograph = decode_photograph(self.root / file, f"{self.dataset}: {file}")
        resized = photograph.resize(self.size[::-1], Image.Resampling.BILINEAR)
        return {
            SAMPLE_ID: np.array(index, dtype=np.int64),
            IMAGE: np.asarray(resized, dtype=np.uint8),
            self.task: np.array(self.labels[index], dtype=np.int64),
        }


def _check_domains(office: OfficeSet, root: Path, domains: Sequence[str]) -> None:
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(
            f"{office.name}: {root} {problem}; expected a folder with {office.layout}. Set data.path "
            "to it."
        )
    for domain in domains:
        folder = domain_folder(office, root, domain)
        if (folder / office.images).is_dir():
            continue
        where = folder if folder.is_dir() else root
        holds = listing(path.name for path in visible(where))
        missing = "/".join(filter(None, (domain, office.images)))
        raise ValueError(
            f"{office.name}: {root} has no folder {missing}; expected {office.layout}; {where} "
            f"holds {holds}."
        )
