"""What runs could leave behind in the cluster and on this machine."""

from __future__ import annotations

import contextlib
import os
import time
from unittest import mock

import psutil
import ray
from ray.util.state import list_actors


def leftovers(patience_s: float = 120.0) -> list[str]:
    """Placement groups, actors and processes of runs; what is still there when patience ends."""
    deadline = time.monotonic() + patience_s
    while (found := _now()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _now() -> list[str]:
    groups = ray.util.placement_group_table().values()
    # Ray's state functions prefer this variable to their own argument, and look for any Ray at "local".
    with mock.patch.dict(os.environ, RAY_ADDRESS=ray.get_runtime_context().gcs_address):
        actors = list_actors(filters=[("state", "=", "ALIVE")])
    titles = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            titles.append(" ".join(process.cmdline()).strip())
    return [
        *(group["placement_group_id"] for group in groups if group["state"] != "REMOVED"),
        *(actor.class_name for actor in actors if _is_of_a_run(actor.class_name)),
        *(title for title in titles if title.startswith("ray::") and _is_of_a_run(title)),
    ]


def _is_of_a_run(name: str) -> bool:
    """Ray Train keeps one TrainStateActor for the whole cluster."""
    return "Train" in name.replace("TrainStateActor", "") or "PlacementGroupCleaner" in name
