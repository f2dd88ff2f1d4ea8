"""Placement groups whose run has ended without removing them.

Owns their removal while a search runs and at its end. A trial that is stopped dies with its driver;
then Ray Train's controller dies, and a cleaner of Ray's should remove what the controller had
reserved. Two of 50 such groups stayed on a busy machine, CPUs that the next trials wait for, so it
is looked for here too, in the one table that knows who made a group and whether that actor lives.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.tune import Callback
from ray.util.placement_group import PlacementGroup, remove_placement_group

EVERY_S = 2.0
PATIENCE_S = 20.0
"""After a search, for controllers that are about to die."""


class Removal(Callback):
    """Removes orphans every `EVERY_S` seconds of a search."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.time() >= self._next:
            remove_orphans()
            self._next = time.time() + EVERY_S


def remove_last() -> None:
    """Removes those that a search's last trials leave, which die after Tune has said goodbye."""
    deadline = time.monotonic() + PATIENCE_S
    while remove_orphans() and time.monotonic() < deadline:
        time.sleep(0.2)


def remove_orphans() -> int:
    """Removes this job's placement groups whose maker, an actor, has died.

    Returns:
        How many groups of actors of this job there still were, removed ones included.
    """
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    seen = 0
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        gone = group.state == PlacementGroupTableData.REMOVED
        if gone or group.creator_job_id != job or not group.creator_actor_id.strip(b"\xff"):
            continue
        seen += 1
        if group.creator_actor_dead and not group.is_detached:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return seen
