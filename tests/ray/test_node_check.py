"""Nodes that are not like the driver are found at the start, on real tasks and workers; so are
clusters with other versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from repmtl_ray import cluster, fit, node_check, storage
from repmtl_ray.config import Experiment
from repmtl_ray.node_check import DriverNote
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.fixture
def with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the cluster might have other nodes than this one."""
    monkeypatch.setattr(cluster, "has_other_nodes", lambda: True)


@pytest.fixture
def note(tmp_path: Path) -> DriverNote:
    location = str(tmp_path / "note")
    storage.write_text(location, "content")
    return DriverNote(
        sources=node_check.source_digest(),
        python=platform.python_version(),
        location=location,
        content="content",
    )


def test_a_single_node_is_left_alone(tmp_path: Path) -> None:
    node_check.check_nodes(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_nodes_that_share_all_pass_and_each_leaves_its_file(
    with_others: None, tmp_path: Path
) -> None:
    node_check.check_nodes(str(tmp_path))
    assert len(list((tmp_path / ".nodes").iterdir())) == 1 + len(ray.nodes())


def test_a_storage_that_nodes_do_not_share_is_refused(
    with_others: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "write_text", lambda location, text: None)  # another disk
    with pytest.raises(ValueError, match=r"the storage is not shared by the nodes; give --storage"):
        node_check.check_nodes(str(tmp_path))


def test_a_file_that_a_node_wrote_must_reach_the_driver(
    with_others: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "exists", lambda location: False)
    with pytest.raises(ValueError, match=r"the driver does not see the file that node .* wrote"):
        node_check.check_nodes(str(tmp_path))


def test_other_sources_are_refused_at_the_start(
    with_others: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_check, "source_digest", lambda: "0123456789ab")  # the driver's alone
    with pytest.raises(ValueError, match=r"has other sources of repmtl_ray .*0123456789ab.*ray up"):
        node_check.check_nodes(str(tmp_path))


@pytest.mark.slow
def test_a_worker_on_a_node_that_came_later_says_what_is_wrong(
    with_others: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_check, "check_nodes", lambda directory: None)  # it was not there
    monkeypatch.setattr(node_check, "source_digest", lambda: "0123456789ab")
    with pytest.raises(ValueError, match="has other sources of repmtl_ray"):
        fit(experiment, storage=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": "3.9.1"}, r"runs Python 3\.\d+\.\d+, the driver 3\.9\.1"),
        ({"content": "of another disk"}, "the storage is not shared"),
        ({"location": "nosuch://bucket/note"}, "cannot read the storage"),
    ],
)
def test_what_a_worker_compares(note: DriverNote, change: dict[str, str], message: str) -> None:
    assert re.search(message, node_check.problem_on_this_node(replace(note, **change)))


def test_a_worker_that_is_like_the_driver_has_no_problem(note: DriverNote) -> None:
    assert node_check.problem_on_this_node(note) == ""
    assert node_check.problem_on_this_node(None) == ""


def test_a_node_without_the_project_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "repmtl_ray", None)
    problem, _ = node_check._probe()._function({})
    assert "cannot import repmtl_ray" in problem
    assert "ray up" in problem


def test_a_storage_that_cannot_be_written_is_refused(with_others: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        node_check.write_driver_note(str(tmp_path / "file"))


OTHER_RAY = """
import ray._private.utils as utils
from repmtl_ray import cluster

utils.compute_version_info = lambda: ("1.0.0", "3.9.1")
try:
    cluster.connect()
except ValueError as error:
    print("refused:", error)
"""


def test_a_cluster_with_another_ray_is_refused_with_both_versions() -> None:
    address = ray.get_runtime_context().gcs_address
    found = subprocess.run(
        [sys.executable, "-c", OTHER_RAY],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "refused: the cluster at" in found.stdout, found.stdout + found.stderr
    assert "1.0.0" in found.stdout
    assert ray.__version__ in found.stdout
    assert "ray submit" in found.stdout


def test_ray_says_nothing_of_waiting_where_nothing_grows() -> None:
    assert cluster.waiting_for() == ""
    assert cluster.allowed_nodes() == []
