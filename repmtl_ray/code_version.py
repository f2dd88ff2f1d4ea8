"""Which code a result was made with: the version of this package, and a digest of its sources.

Owns the note that a run's folder keeps of it, and what is said when other code goes on. Imports
neither torch nor Ray.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import repmtl_ray


@functools.cache
def source_digest() -> str:
    """Of this project's source files as they are on this machine, committed or not."""
    root = Path(repmtl_ray.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def current() -> dict[str, str]:
    """The code of this process, as it is noted."""
    return {"version": repmtl_ray.__version__, "sources": source_digest()}


def difference(noted: Mapping[str, object]) -> str:
    """How the code of this process differs from a note; empty if it does not.

    Args:
        noted: as `current` gave it.

    Returns:
        For example "repmtl_ray 0.1.0 (sources 1a2b), now 0.1.0 (sources 3c4d)".
    """
    now = current()
    if dict(noted) == now:
        return ""
    return (
        f"repmtl_ray {noted.get('version', 'of an unknown version')} (sources "
        f"{noted.get('sources', 'unknown')}), now {now['version']} (sources {now['sources']})"
    )
