"""Small files, whole, in a folder or a bucket, through pyarrow.

Owns paths and URIs of results and of prepared data, and what a storage's errors mean; checkpoints
are written by Ray. Imports neither torch nor Ray.

A location is a local path, or a URI as pyarrow reads it: `s3://bucket/key` or `gs://bucket/key`.
For a server other than Amazon's: the environment's AWS_ENDPOINT_URL, or the URI's own
`?endpoint_override=host:port&scheme=http`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import fs

DEFAULT_STORAGE = Path("~/repmtl_ray_results")


def absolute(storage: str | Path | None) -> str:
    """An absolute path or a URI (Ray refuses relative paths); None is the default folder."""
    text = str(DEFAULT_STORAGE if storage is None else storage)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve())


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
        raise ValueError(f"{location}: {_meaning(error)}") from error


def _meaning(error: OSError) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()
    if "no_such_bucket" in lower or ("bucket" in lower and "not found" in lower):
        return "there is no such bucket; create it, or correct the name."
    if isinstance(error, PermissionError) or "access_denied" in lower or "permission" in lower:
        return (
            f"permission denied ({text}); check the folder's owner, or the credentials (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile) and the bucket's policy."
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
        return "there is no such file; correct the path, or restore the file."
    return text


def exists(location: str) -> bool:
    system, path = open_location(location)
    return system.get_file_info(path).type != fs.FileType.NotFound


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
        draft.unlink(missing_ok=True)
