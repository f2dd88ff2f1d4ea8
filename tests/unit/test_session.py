"""The recorded session of the documents runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import session
from tests.helpers.paths import ROOT


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)  # fifteen commands, each a process of its own, on whatever machine
def test_the_session_runs_and_prints_what_the_document_shows(tmp_path: Path) -> None:
    """Every exit code is 0. Numbers, and so the order of rows, may differ on another processor."""
    recorded = session.DOCUMENT.read_text()
    now = session.record(recorded, tmp_path)
    words = session.words_of(recorded)
    assert len(words) > 80
    assert len(words - session.words_of(now)) < 0.1 * len(words), words - session.words_of(now)
    for name, made in session.PICTURES.items():
        shown = ROOT / "docs" / "images" / name
        assert shown.stat().st_size < 200_000
        assert f"images/{name}" in recorded
        with Image.open(shown) as old, Image.open(tmp_path / "repmtl_ray" / made) as new:
            assert old.size == new.size, name


def test_no_path_of_the_machine_that_recorded_it_is_in_the_document() -> None:
    printed = session.DOCUMENT.read_text()
    assert not [word for word in ("/tmp", "/home", "/root", "/work") if word in printed]
