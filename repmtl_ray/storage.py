"""Small files, whole, in a folder or a bucket, through pyarrow.

Owns paths and URIs of results and of prepared data, the names of runs, retries, and what a
storage's errors mean. Imports neither torch nor Ray.

A location is a local path, or a URI as pyarrow reads it: `s3://bucket/key` or `gs://bucket/key`.
For a server other than Amazon's: the environment's AWS_ENDPOINT_URL, or the URI's own
`?endpoint_override=host:port&scheme=http`.

`read`, `write`, `list_names` and `remove` try again when a storage fails for a moment; what a run
must not lose goes through them. `read_bytes` and `write_bytes` try once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pyarrow
from pyarrow import fs

logger = logging.getLogger(__name__)

DEFAULT_STORAGE = Path("~/repmtl_ray_results")
BASELINES = "baselines"
"""The folder of a storage that holds the single-task runs of all searches and benchmarks."""
WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between one attempt and the next."""
PERMANENT = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
"""Errors that another attempt would meet again."""

T = TypeVar("T")


class StorageError(ValueError):
    """A storage that still failed after the last attempt."""


def absolute(storage: str | Path | None) -> str:
    """An absolute path or a URI (Ray refuses relative paths); None is the default folder.

    Raises:
        ValueError: an empty text, or a file:// URI of another machine.
    """
    text = str(DEFAULT_STORAGE if storage is None else storage)
    if not text.strip():
        raise ValueError("storage is empty; expected a folder, s3://bucket/key or gs://bucket/key.")
    if text.startswith("file:"):
        parts = text.removeprefix("file:")
        host, slash, path = parts.removeprefix("//").partition("/")
        if not parts.startswith("//"):
            host, slash, path = "", "/", parts.lstrip("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(f"storage {text!r} is no local folder; expected file:///folder.")
        return str(Path("/", urllib.parse.unquote(path)).resolve())
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve())


def check_name(name: str, what: str = "name") -> str:
    """The name of a run or a study, which becomes the name of one folder.

    Raises:
        ValueError: a name that is no folder's, or that this project uses itself.
    """
    is_plain = re.fullmatch(r"[^/\\\x00-\x1f?#:*\"<>|]{1,200}", name) is not None
    if not is_plain or name.strip(" .") != name or name == BASELINES:
        raise ValueError(
            f"{what} is {name!r}; expected the name of one folder: up to 200 characters without "
            f'/ \\ ? # : * " < > |, no dot or blank at its ends, and not {BASELINES!r}.'
        )
    return name


def check_writable(location: str) -> None:
    """Writes and removes a small file, so that a storage that cannot be used is found at once.

    Folders that do not exist yet are made for it and removed again.

    Args:
        location: the folder or URI that will be written to.

    Raises:
        ValueError: what is wrong with it, and what to do.
    """
    probe = join(location, f".{uuid.uuid4().hex}.probe")
    missing: list[Path] = []
    if "://" not in location:
        folders = [Path(location), *Path(location).parents]
        missing = [folder for folder in folders if not os.path.lexists(folder)]
    with explained(location):
        try:
            write_bytes(probe, b"repmtl_ray\n")
            system, path = open_location(probe)
            system.delete_file(path)
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def is_local(location: str) -> bool:
    return "://" not in location or location.startswith("file://")


def join(location: str, *parts: str) -> str:
    """The location of something below; a URI keeps its query."""
    base, question, query = location.partition("?") if "://" in location else (location, "", "")
    return "/".join([base.rstrip("/"), *parts]) + question + query


@functools.lru_cache(maxsize=32)
def _system(base: str, query: str) -> tuple[fs.FileSystem, str]:
    """One connection for all that has the same scheme, bucket and query."""
    return fs.FileSystem.from_uri(base + query)


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path in it.

    Raises:
        ValueError: a URI that pyarrow cannot read, or whose bucket cannot be found.
    """
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    base, question, query = location.partition("?")
    scheme, _, path = base.partition("://")
    if scheme == "file":
        return fs.LocalFileSystem(), fs.FileSystem.from_uri(location)[1]
    bucket, _, key = path.partition("/")
    with explained(location):
        try:
            system, root = _system(f"{scheme}://{bucket}", question + query)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{location} is no location: {error}; expected a path, s3://bucket/key or "
                "gs://bucket/key."
            ) from error
    return system, f"{root}/{key}".rstrip("/")


@contextlib.contextmanager
def explained(location: str) -> Iterator[None]:
    """Turns what a storage says into an error for users.

    Raises:
        ValueError: instead of any OSError: what was found at the location, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{location}: {meaning(error)}") from error


def meaning(error: Exception) -> str:
    """What a storage said, and what to do."""
    text = " ".join(str(error).split())
    lower = text.lower()
    number = error.errno if isinstance(error, OSError) else None
    no_bucket = ("no_such_bucket", "not found", "not exist")
    if "bucket" in lower and any(words in lower for words in no_bucket):
        return "there is no such bucket; create it, or correct the name."
    if number == errno.EROFS or "read-only file system" in lower:
        return f"the file system is read-only ({text}); name another folder."
    if isinstance(error, NotADirectoryError | FileExistsError) or "not a directory" in lower:
        return f"a file is in the way of a folder ({text}); name another folder."
    denied = ("access_denied", "access denied", "permission", "credential", "forbidden")
    if isinstance(error, PermissionError) or any(words in lower for words in denied):
        return (
            f"permission denied ({text}); check the folder's owner, or give this machine credentials (an instance "
            "profile, a service account, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and check the bucket's policy."
        )
    if any(word in lower for word in ("no space left", "file too large", "quota exceeded")):
        return (
            f"the disk is full ({text}); make room and run the same command again: what was "
            "finished is kept."
        )
    if "network_connection" in lower or "resolve" in lower:
        return (
            f"cannot be reached ({text}); check the network, AWS_ENDPOINT_URL or the URI's "
            "endpoint_override."
        )
    if "missingcontentlength" in lower:
        return (
            f"the server knows no trailing checksums ({text}); set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
        )
    if isinstance(error, FileNotFoundError) or "no such file" in lower:
        return f"there is no such file or folder ({text}); correct the path."
    return text


def exists(location: str) -> bool:
    """
    Raises:
        ValueError: the storage does not say.
    """
    with explained(location):
        system, path = open_location(location)
        return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(location: str) -> bytes:
    """A whole file."""
    system, path = open_location(location)
    with system.open_input_stream(path) as stream:
        return stream.read()


def read_text(location: str) -> str:
    """A whole UTF-8 file."""
    return read_bytes(location).decode()


def write_text(location: str, text: str) -> None:
    """Writes a whole UTF-8 file; a reader sees the old one or the new one, never a part."""
    write_bytes(location, text.encode())


def write_bytes(location: str, data: bytes | pyarrow.Buffer) -> None:
    """Writes a whole file; a reader sees the old one or the new one, never a part.

    On a disk a draft is flushed and renamed; an object appears in its bucket when its last part has
    arrived.
    """
    system, path = open_location(location)
    if not isinstance(system, fs.LocalFileSystem):
        with system.open_output_stream(path) as stream:
            stream.write(data)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{path}.{uuid.uuid4().hex}.partial")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):  # the error of the write is the one to show
            draft.unlink()


def read(location: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: there is none; this is not tried again.
        StorageError: anything else that the storage says, after the last attempt.
    """
    return _with_retries(lambda: read_bytes(location), f"reading {location}")


def write(location: str, data: bytes) -> None:
    """Writes a whole file: a reader sees all of it or none.

    Raises:
        StorageError: the storage refused it to the last attempt; drafts are gone.
    """
    what = f"writing {len(data) / 1e6:.3g} MB to {location}"
    _with_retries(lambda: write_bytes(location, data), what)


def list_names(location: str) -> list[str]:
    """What a folder holds directly, sorted; nothing if it does not exist.

    Raises:
        StorageError: as for `read`.
    """

    def attempt() -> list[str]:
        system, path = open_location(location)
        entries = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(entry.base_name for entry in entries)

    return _with_retries(attempt, f"listing {location}")


def remove(location: str) -> None:
    """Removes a file or a folder with all it holds; what is not there is no error.

    Raises:
        StorageError: as for `read`.
    """

    def attempt() -> None:
        system, path = open_location(location)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.Directory:
            system.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            system.delete_file(path)

    _with_retries(attempt, f"removing {location}")


def _with_retries(attempt: Callable[[], T], what: str) -> T:
    for wait in (*WAITS_S, None):
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except PERMANENT as error:
            raise StorageError(f"{what} failed: {meaning(error)}") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise StorageError(f"{what} failed: {meaning(error)}") from error
            reason = error.strerror or str(error)
            if wait is None:
                raise StorageError(
                    f"{what} failed {len(WAITS_S) + 1} times, at last with: {reason}. Make the storage reachable and "
                    "writable again, then start under the same name: everything stored before is whole."
                ) from error
            logger.warning("%s failed (%s); once more in %g s", what, reason, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
