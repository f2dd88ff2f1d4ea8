"""A run of one or two workers grows when a second node comes, over real raylets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.survival import EXPERIMENT
from tests.helpers import training
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_grows_with_the_cluster_and_ends_as_one_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, since this one may be part of another Ray. That the run had one
    worker first and two in the end is checked there (`bench/nodes.py`)."""
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "scenes"))
    expected = training.run(EXPERIMENT).history
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.grow_run", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    grown = json.loads(ended.stdout.splitlines()[-1])
    for epoch, reference in zip(grown, expected, strict=True):
        assert epoch == pytest.approx(reference, rel=1e-6, abs=1e-9)
