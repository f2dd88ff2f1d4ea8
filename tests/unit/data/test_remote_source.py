"""Copies of data sets that lie elsewhere; file systems of this machine stand in for the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from repmtl_ray import cli
from repmtl_ray.cli.commands import prepare
from repmtl_ray.data.remote_source import local_folder
from repmtl_ray.data.sources import open_streams
from tests.helpers.forms import make_parquet

LOCATION = "hf://datasets/tanganke/nyuv2"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `LOCATION` in a hub that is a folder of this machine."""

    class Hub(DirFileSystem):
        protocol = "hf"
        cachable = False

        def __init__(self, **_options: object) -> None:
            super().__init__(path=str(tmp_path / "hub"), fs=LocalFileSystem())

    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub/datasets/tanganke/nyuv2"


def test_a_mirror_on_the_hub_is_read_from_its_copy(hub: Path, tmp_path: Path) -> None:
    make_parquet(hub, "nyuv2")
    (hub / ".gitattributes").write_text("hidden")
    out, sizes = str(tmp_path / "out"), ["--height", "48", "--width", "64"]
    parser = cli.parser_of("prepare")
    data = prepare._config(parser.parse_args(["nyuv2", "--source", LOCATION, "--out", out, *sizes]))
    copied = Path(str(data.path))
    assert copied.is_relative_to(tmp_path / "cache")
    files = {path.relative_to(hub): path.read_bytes() for path in hub.glob("data/*")}
    assert {path.relative_to(copied): path.read_bytes() for path in copied.glob("*/*")} == files
    assert not (copied / ".gitattributes").exists()
    (found,) = open_streams(data, "train")
    (expected,) = open_streams(dataclasses.replace(data, path=str(hub)), "train")
    assert found.num_samples == expected.num_samples
    for name, values in expected.load(0).items():
        np.testing.assert_array_equal(found.load(0)[name], values)


def test_only_files_that_are_not_whole_are_copied_again(hub: Path) -> None:
    make_parquet(hub, "nyuv2")
    folder = Path(local_folder(LOCATION))
    kept, cut = sorted(folder.glob("data/*"))[:2]
    time = kept.stat().st_mtime_ns
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    assert local_folder(LOCATION) == str(folder)
    assert (cut.read_bytes(), kept.stat().st_mtime_ns) == (whole, time)
    assert not list(folder.rglob("*.part"))


def test_folders_of_this_machine_stay_where_they_are(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (LOCATION, r"hf://datasets/tanganke/nyuv2.*: there is no such file or folder"),
        ("nowhere://x/y", r"nowhere://x/y cannot be read \(ValueError: Protocol not known"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_error(location: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_folder(location)


def test_an_empty_source_is_refused(hub: Path) -> None:
    hub.mkdir(parents=True)
    with pytest.raises(ValueError, match="there are no files"):
        local_folder(LOCATION)


def test_what_the_hubs_library_raises_is_one_line(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ConnectError(Exception):
        """As the hub's HTTP library has it: no OSError."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(DirFileSystem, "isdir", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main("prepare", ["nyuv2", "--source", LOCATION, "--out", str(hub / "out")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {LOCATION} cannot be read (ConnectError: [Errno -2] Name or service not known); check "
        "its name and the network."
    )
