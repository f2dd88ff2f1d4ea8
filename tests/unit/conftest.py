"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scenes_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where street scenes are rendered to, apart from the user's."""
    cache = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPMTL_RAY_CACHE", str(cache))
        yield cache
