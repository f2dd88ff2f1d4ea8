"""Small files in folders and buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repmtl_ray import storage


def test_storage_paths_are_absolute_and_uris_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("runs") == str(tmp_path / "runs")
    assert storage.absolute(Path("runs/../other")) == str(tmp_path / "other")
    assert storage.absolute("~/runs") == str(tmp_path / "home/runs")
    assert storage.absolute(None) == str(tmp_path / "home/repmtl_ray_results")
    assert storage.absolute("s3://bucket/runs/") == "s3://bucket/runs"


@pytest.mark.parametrize("folder", ["new/deeper", "with space", "per%20cent", "ünï#?"])
def test_text_survives_a_trip_through_storage(tmp_path: Path, folder: str) -> None:
    for location in (str(tmp_path / folder / "a.json"), (tmp_path / folder / "b").as_uri()):
        assert not storage.exists(location)
        storage.write_text(location, "delta_p: Δ\n")
        assert storage.exists(location)
        assert storage.read_text(location) == "delta_p: Δ\n"
        storage.write_text(location, "shorter")
        assert storage.read_text(location) == "shorter"
    assert (tmp_path / folder / "a.json").read_text() == "shorter"
    assert len(list((tmp_path / folder).iterdir())) == 2, "no drafts are left"
    assert storage.exists(str(tmp_path / folder))


def test_a_crash_while_writing_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = str(tmp_path / "file")
    storage.write_text(location, "old")

    def full(*_paths: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            storage.write_text(location, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "no drafts are left"
    assert storage.read_text(location) == "old"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("AWS Error NO_SUCH_BUCKET during PutObject", "create it, or correct the name"),
        ("AWS Error ACCESS_DENIED during ListObjects", "permission denied .*credentials"),
        ("[Errno 28] No space left on device", "the disk is full .*make room"),
        ("AWS Error NETWORK_CONNECTION: could not connect", "check the network"),
        (
            "AWS Error UNKNOWN (HTTP status 411): ExceptionName: MissingContentLength",
            "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        ),
        ("something new", "^s3://b/k: something new$"),
    ],
)
def test_what_a_storage_says_is_explained(said: str, meant: str) -> None:
    with pytest.raises(ValueError, match=meant), storage.explained("s3://b/k"):
        raise OSError(said)
