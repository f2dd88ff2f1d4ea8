"""Data sets on another machine: their files are copied to this one, where they are read.

Owns which locations there are and where the copies lie. A location is one of `storage` (s3://, gs://), or
any that fsspec knows: hf://datasets/OWNER/NAME is a data set of the Hugging Face Hub.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import fsspec
from pyarrow import fs

from repmtl_ray import storage
from repmtl_ray.data import manifest
from repmtl_ray.scenes.scene_cache import cache_root

_OF_STORAGE = ("s3", "gs", "gcs")
_UNFINISHED = ".part"


def local_folder(location: str) -> str:
    """A folder of this machine that holds what is at a location.

    A folder of this machine and a shard store stay where they are. Anything else is copied into the
    cache; a file that is there with its whole size is not copied again.

    Args:
        location: a path or a URI.

    Raises:
        ValueError: an unknown kind of URI, a source that cannot be reached or holds no files, or a disk
            that is full.
    """
    scheme = location.partition("://")[0]
    if storage.is_local(location):
        return location
    if scheme in _OF_STORAGE and storage.exists(storage.join(location, manifest.FILE)):
        return location
    name = re.sub(r"[^A-Za-z0-9]+", "-", location).strip("-")[-60:]
    try:
        folder = (
            cache_root() / f"source-{name}-{hashlib.sha256(location.encode()).hexdigest()[:12]}"
        )
        system, root = _opened(location, scheme)
        files = _files(system, root)
        if not files:
            raise ValueError("there are no files")
        num_bytes = sum(file.size or 0 for file in files)
        print(
            f"copying {location} to {folder}: {len(files)} files, {num_bytes / 1e9:.2f} GB",
            flush=True,
        )
        for file in files:
            _copy(system, file, folder / file.path[len(root) :].lstrip("/"))
    except OSError as error:
        raise ValueError(f"{location}: {storage.meaning(error)}") from error
    except Exception as error:  # of the library behind the URI, each of which has its own kinds
        raise ValueError(
            f"{location} cannot be read ({type(error).__name__}: {error}); check its name and the network."
        ) from error
    return str(folder)


def _opened(location: str, scheme: str) -> tuple[fs.FileSystem, str]:
    if scheme in _OF_STORAGE:
        return storage.open_location(location)
    system, root = fsspec.core.url_to_fs(location)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), root


def _files(system: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """Everything below, without hidden files and folders."""
    found = system.get_file_info(fs.FileSelector(root, recursive=True))
    return sorted(
        (file for file in found if file.is_file and "/." not in file.path[len(root) :]),
        key=lambda file: file.path,
    )


def _copy(system: fs.FileSystem, file: fs.FileInfo, target: Path) -> None:
    """Copies a file; an interruption leaves no file that looks whole."""
    if target.is_file() and target.stat().st_size == file.size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + _UNFINISHED)
    fs.copy_files(
        file.path,
        str(unfinished),
        source_filesystem=system,
        destination_filesystem=fs.LocalFileSystem(),
    )
    unfinished.replace(target)
