"""Small text files in a folder or a bucket, through pyarrow.

Owns paths and URIs of results; checkpoints are written by Ray. Imports neither torch nor Ray.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pyarrow import fs

DEFAULT_STORAGE = Path("~/repmtl_ray_results")


def absolute(storage: str | Path | None) -> str:
    """An absolute path or a URI (Ray refuses relative paths); None is the default folder."""
    text = str(DEFAULT_STORAGE if storage is None else storage)
    return text.rstrip("/") if "://" in text else str(Path(text).expanduser().resolve())


def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the path in it."""
    return fs.FileSystem.from_uri(
        location if "://" in location else Path(location).absolute().as_uri()
    )


def exists(location: str) -> bool:
    system, path = open_location(location)
    return system.get_file_info(path).type != fs.FileType.NotFound


def read_text(location: str) -> str:
    """A whole UTF-8 file."""
    system, path = open_location(location)
    with system.open_input_stream(path) as stream:
        return stream.read().decode()


def write_text(location: str, text: str) -> None:
    """Writes a whole UTF-8 file; a reader sees the old one or the new one, never a part."""
    system, path = open_location(location)
    system.create_dir(path.rsplit("/", 1)[0], recursive=True)
    draft = f"{path}.{uuid.uuid4().hex}"
    with system.open_output_stream(draft) as stream:
        stream.write(text.encode())
    system.move(draft, path)
