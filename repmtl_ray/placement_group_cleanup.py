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
from ray.util.placement_group import remove_placement_group

from repmtl_ray import ray_compat

EVERY_S = 2.0
"""Between two looks for such groups while a search runs."""
RUN_ACTORS = ("TrainController", "ImplicitFunc", "InProcessTrial")
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
    """Kills the Tune trials and Ray Train controllers of this process; what they started dies with
    them. A Ray that was stopped has none."""
    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
        for actor in ray_compat.live_actors(*RUN_ACTORS):
            with contextlib.suppress(
                ValueError
            ):  # the controller of a trial, which only this one knows
                ray_compat.kill_actor(actor)


def remove_last_groups() -> None:
    """Removes those that the last trials of a search leave which stops trials early."""
    now = time.monotonic()
    deadline, seen_at = now + PATIENCE_S, now
    while now < deadline and now - seen_at < QUIET_S:
        num_controllers = len(ray_compat.live_actors("TrainController"))
        if num_controllers + remove_orphaned_groups():
            seen_at = now
        time.sleep(0.2)
        now = time.monotonic()


def remove_orphaned_groups() -> int:
    """Removes this job's placement groups whose maker, an actor, has died.

    Returns:
        How many groups of actors of this job there still were, removed ones included.
    """
    groups = ray_compat.groups_of_actors()
    for group in groups:
        if not group.is_detached and ray_compat.is_dead(group.maker):
            remove_placement_group(group.group)
    return len(groups)
