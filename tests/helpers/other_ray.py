"""A second Ray on this machine, as two people on one server have."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

PROGRAM = """
import ray, sys
from repmtl_ray import cluster
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
print(cluster.has_dashboard(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def another_ray() -> Iterator[None]:
    """Without a dashboard."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "False\n", "it has a dashboard?"
        yield
    finally:
        process.stdin.close()  # it ends its Ray
        process.wait(timeout=200)
        process.stdout.close()
