"""Files that a run must not lose: written whole, with patience, in a folder or a bucket.

Owns retries, what a storage that stays away is called, and listing and removing what a run wrote.
Locations are those of `storage.py`. Imports neither torch nor Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from pyarrow import fs

from repmtl_ray import storage

logger = logging.getLogger(__name__)

WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Between one attempt and the next."""

T = TypeVar("T")


class StorageError(ValueError):
    """A storage that still failed after the last attempt."""


def read(location: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: there is none; not tried again.
        StorageError: anything else that the storage says, after the last attempt.
    """

    return _patiently(lambda: storage.read_bytes(location), f"reading {location}")


def write(location: str, data: bytes) -> None:
    """Writes a whole file: a reader sees all of it or none.

    Raises:
        StorageError: the storage refused it to the last attempt; drafts are gone.
    """
    what = f"writing {len(data) / 1e6:.3g} MB to {location}"
    _patiently(lambda: storage.write_bytes(location, data), what)


def names(location: str) -> list[str]:
    """What a folder holds directly, sorted; nothing if it does not exist.

    Raises:
        StorageError: as for `read`.
    """

    def attempt() -> list[str]:
        system, path = storage.open_location(location)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    return _patiently(attempt, f"listing {location}")


def remove(location: str) -> None:
    """Removes a file or a folder with all it holds; what is not there is no error.

    Raises:
        StorageError: as for `read`.
    """

    def attempt() -> None:
        system, path = storage.open_location(location)
        kind = system.get_file_info(path).type
        if kind == fs.FileType.Directory:
            system.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            system.delete_file(path)

    _patiently(attempt, f"removing {location}")


def _patiently(attempt: Callable[[], T], what: str) -> T:
    for wait in (*WAITS_S, None):
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except OSError as error:
            if wait is None:
                raise StorageError(
                    f"{what} failed {len(WAITS_S) + 1} times, at last with: {_words(error)}. Make the storage reachable and "
                    "writable again, then start under the same name: everything stored before is whole."
                ) from error
            logger.warning("%s failed (%s); once more in %g s", what, _words(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _words(error: OSError) -> str:
    return error.strerror or str(error)
