"""What runs leave in the cluster when they are stopped: their actors and their placement groups.

Owns the end of the actors of an interrupted run, and the removal of placement groups whose run has
ended without removing them, while a search runs and at its end. A trial that is stopped dies with its driver;
then Ray Train's controller dies, and a cleaner of Ray's should remove what the controller had
reserved. On a busy machine some of 50 such groups stayed, CPUs that the next trials wait for:

- Ray's cleaner is told of a group only once its workers have started: not of one that a controller
  reserves shortly before its death.
- Of some groups Ray's table never says that their maker is dead (`creator_actor_dead` stays false;
  probably they reach it after the death), so that the maker itself has to be looked up.
- The last trials' controllers die after Tune has said goodbye.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group

EVERY_S = 2.0
"""Between two looks for such groups while a search runs."""
RUN_ACTORS = ("TrainController", "ImplicitFunc")
"""Class names of the actors that a run of Ray Train and a trial of Ray Tune hang on."""
PATIENCE_S = 20.0
"""After a search, for controllers that are about to die."""
QUIET_S = 2.0
"""Without a controller or a group, after which no late one is expected: a process that Ray calls dead
may live on for a moment."""


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Around what Ray trains: a KeyboardInterrupt ends this process's runs in the cluster too."""
    try:
        yield
    except KeyboardInterrupt:
        _kill_own_runs()
        raise


def _kill_own_runs() -> None:
    """Kills the Tune trials and Ray Train controllers of this process; their workers die with them."""
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    kill = ray._private.worker.global_worker.core_worker.kill_actor  # type: ignore[attr-defined]
    for actor_id, actor in state.actor_table(None, job, "ALIVE").items():
        if actor["ActorClassName"] in RUN_ACTORS:
            kill(ray.ActorID(bytes.fromhex(actor_id)), True)


def remove_last_groups() -> None:
    """Removes those that the last trials of a search leave which stops trials early."""
    now = time.monotonic()
    deadline, seen_at = now + PATIENCE_S, now
    while now < deadline and now - seen_at < QUIET_S:
        if _num_controllers() + remove_orphaned_groups():
            seen_at = now
        time.sleep(0.2)
        now = time.monotonic()


def remove_orphaned_groups() -> int:
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
