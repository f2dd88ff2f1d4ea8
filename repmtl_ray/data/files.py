"""Listings of data folders: which entries count, and which files are one and the same.

Owns what is never data (hidden entries and the leavings of operating systems and tools), and the
comparison of files by identity and by content. Reading what is in a file is for other modules.
"""

from __future__ import annotations

import functools
import hashlib
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_NEVER_DATA = frozenset(
    [
        "__macosx",
        "__pycache__",
        "@eadir",
        "lost+found",
        "$recycle.bin",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    ]
)
"""Lower-case names that macOS, Windows, network disks and Python leave behind in any folder."""
_BLOCK_BYTES = 4096


def is_hidden(path: str) -> bool:
    """Whether any part of a path is hidden, or was left behind by a system and is never data.

    Args:
        path: a name, or a path below the data set's folder, with forward slashes.
    """
    return any(
        part.lower() in _NEVER_DATA or (part.startswith(".") and part not in (".", ".."))
        for part in path.split("/")
    )


def visible(folder: Path) -> list[Path]:
    """The entries of a folder that may be data, by name."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def visible_below(root: Path, *patterns: str) -> list[Path]:
    """The paths below a folder that match one of the patterns and may be data, sorted."""
    paths = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in paths if not is_hidden(path.relative_to(root).as_posix()))


def listing(names: Iterable[str]) -> str:
    """The names, as an error message lists what was found; the first few if there are many."""
    names = sorted(names)
    shown = ", ".join(names[:8])
    return (shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


class FileIdentity(NamedTuple):
    """Equal for two paths that lead to one file: by a link, or spelled in another way."""

    device: int
    inode: int
    num_bytes: int
    changed_ns: int


def file_identity(path: Path) -> FileIdentity | None:
    """The identity of a regular file, links followed; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class SplitFile(NamedTuple):
    """A file that is a sample, or holds samples, of a split.

    Attributes:
        split: its name.
        name: path below the data set's folder.
        identity: of the file.
    """

    split: str
    name: str
    identity: FileIdentity


def compare_splits(dataset: str, root: Path, files: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Whether splits share samples.

    Args:
        dataset: begins every message.
        root: its folder.
        files: by split, the paths below root of the files that make a sample what it is.

    Returns:
        A note, if there are copies with equal bytes in two splits.

    Raises:
        ValueError: one file under two names.
    """
    known: dict[FileIdentity, SplitFile] = {}
    for split, names in files.items():
        for name in names:
            identity = file_identity(root / name)
            if identity is None:
                continue  # whoever reads it says so
            file = SplitFile(split, name, identity)
            other = known.setdefault(identity, file)
            if other is not file:
                raise ValueError(
                    f"{dataset}: {file.name} and {other.name} are one file; a sample is in one "
                    "split, once: replace the link, or remove one of the two."
                )
    return tuple(f"{dataset}: {note}" for note in copies_in_splits(root, list(known.values())))


def copies_in_splits(root: Path, files: Sequence[SplitFile]) -> list[str]:
    """A note on files whose bytes are the same and that are in different splits.

    Reads little: of files whose sizes are equal one block in the middle, and files whose blocks are
    equal as a whole.

    Raises:
        ValueError: a file that cannot be read.
    """
    groups: list[list[SplitFile]] = [list(files)]
    for digest in (_size, _middle_digest, _whole_digest):
        groups = [part for group in groups for part in _grouped(root, group, digest)]
    if not groups:
        return []
    one = groups[0][0]
    other = next(file for file in groups[0] if file.split != one.split)
    have = "1 file has a copy" if len(groups) == 1 else f"{len(groups)} files have copies"
    return [
        f"{have} with equal bytes in another split, for example {one.name} ({one.split}) and "
        f"{other.name} ({other.split}); scores on them are too good."
    ]


def _grouped(
    root: Path, files: Sequence[SplitFile], digest: Callable[[str, FileIdentity], object]
) -> list[list[SplitFile]]:
    """Files with equal digests, where they are of several splits."""
    groups: defaultdict[object, list[SplitFile]] = defaultdict(list)
    for file in files:
        try:
            groups[digest(f"{root}/{file.name}", file.identity)].append(file)
        except OSError as error:
            raise ValueError(
                f"{root / file.name} cannot be read ({error.strerror}); copy the file again, or make "
                "it readable."
            ) from error
    return [group for group in groups.values() if len({file.split for file in group}) > 1]


def _size(path: str, identity: FileIdentity) -> int:
    del path
    return identity.num_bytes


@functools.lru_cache(maxsize=2**16)
def _middle_digest(path: str, identity: FileIdentity) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(max(0, identity.num_bytes // 2 - _BLOCK_BYTES // 2))
        return hashlib.sha256(file.read(_BLOCK_BYTES)).digest()


@functools.lru_cache(maxsize=2**16)
def _whole_digest(path: str, identity: FileIdentity) -> bytes:
    del identity  # part of the key: a file that was changed is read again
    return hashlib.sha256(Path(path).read_bytes()).digest()
