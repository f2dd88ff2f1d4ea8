"""Placement groups whose run has ended without removing them.

Owns their removal while a search runs and at its end. A trial that is stopped dies with its driver;
then Ray Train's controller dies, and a cleaner of Ray's should remove what the controller had
reserved. On a busy machine some of 50 such groups stayed, CPUs that the next trials wait for:

- Ray's cleaner is told of a group only once its workers have started: not of one that a controller
  reserves shortly before its death.
- Of some groups Ray's table never says that their maker is dead (`creator_actor_dead` stays false;
  probably they reach it after the death), so that the maker itself has to be looked up.
- The last trials' controllers die after Tune has said goodbye.
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
QUIET_S = 2.0
"""Without a controller or a group, after which no late one is expected: a process that Ray calls dead
may live on for a moment."""


class Removal(Callback):
    """Removes orphans every `EVERY_S` seconds of a search."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.time() >= self._next:
            remove_orphans()
            self._next = time.time() + EVERY_S


def remove_last() -> None:
    """Removes those that the last trials of a search leave which stops trials early."""
    now = time.monotonic()
    deadline, seen_at = now + PATIENCE_S, now
    while now < deadline and now - seen_at < QUIET_S:
        if _num_controllers() + remove_orphans():
            seen_at = now
        time.sleep(0.2)
        now = time.monotonic()


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
        if not group.is_detached and _is_dead(group.creator_actor_id):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return seen


def _is_dead(actor: bytes) -> bool:
    """Ray keeps an actor's row as long as it lives, and long after."""
    row = state.actor_table(actor.hex(), None, None)
    return not row or row["State"] == "DEAD"


def _num_controllers() -> int:
    """Ray Train's, of this job, that live."""
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    alive = state.actor_table(None, job, "ALIVE").values()
    return sum(actor["ActorClassName"] == "TrainController" for actor in alive)
