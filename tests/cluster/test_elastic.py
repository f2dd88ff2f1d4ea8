"""A run of one or two workers grows when a second node comes, over real raylets; the short form of
the campaign's last part (`bench/survival.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_a_run_grows_with_the_cluster_and_ends_as_a_fixed_one(tmp_path):
    """In a process of its own, since this one may be part of another Ray. That the run had one
    worker first and two in the end is checked there."""
    ended = subprocess.run(
        [
            sys.executable,
            *("-m bench.survival --parts arrival --runs 0 --storage".split()),
            tmp_path,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=390,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    row = next(line for line in ended.stdout.splitlines() if line.startswith("| arrival"))
    _, kind, _, survived, _, _, equal, _ = (cell.strip() for cell in row.split("|"))
    assert (kind, survived) == ("arrival, elastic", "yes")
    assert equal in ("yes", "to 1e-6")
