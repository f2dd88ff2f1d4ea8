"""What a killed actor had reserved is given back; what a living one has reserved stays."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group

from repmtl_ray import placement_group_cleanup
from repmtl_ray.placement_group_cleanup import remove_orphaned_groups

pytestmark = pytest.mark.ray


class TrainController:
    """By its name one of Ray Train's."""

    def reserve(self) -> str:
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


Controller: Any = ray.remote(num_cpus=0)(TrainController)


def state_of(group: str) -> str:
    return ray.util.placement_group_table()[group]["state"]


def test_a_dead_actors_group_is_removed_and_a_living_ones_is_not() -> None:
    dead, living = Controller.remote(), Controller.remote()
    lost, kept = ray.get([dead.reserve.remote(), living.reserve.remote()])
    own = placement_group([{"CPU": 1}])
    ray.kill(dead)
    deadline = time.monotonic() + 120
    while state_of(lost) != "REMOVED" and time.monotonic() < deadline:
        remove_orphaned_groups()
        time.sleep(0.1)
    assert state_of(lost) == "REMOVED"
    assert state_of(kept) == "CREATED"
    assert state_of(own.id.hex()) == "CREATED"
    ray.kill(living)
    while remove_orphaned_groups() and time.monotonic() < deadline:
        time.sleep(0.1)
    ray.util.remove_placement_group(own)
    assert remove_orphaned_groups() == 0


def test_a_group_that_ray_heard_of_after_its_makers_death_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's table then never says that the maker is dead."""
    dead = Controller.remote()
    lost = ray.get(dead.reserve.remote())
    ray.kill(dead)
    real = state._connect_and_get_accessor()

    def late() -> list[bytes]:
        rows = [PlacementGroupTableData.FromString(row) for row in real.get_placement_group_table()]
        for row in rows:
            row.creator_actor_dead = False
        return [row.SerializeToString() for row in rows]

    accessor = SimpleNamespace(get_placement_group_table=late, get_actor_info=real.get_actor_info)
    monkeypatch.setattr(state, "_connect_and_get_accessor", lambda: accessor)
    deadline = time.monotonic() + 120
    while placement_group_cleanup.remove_orphaned_groups() and time.monotonic() < deadline:
        time.sleep(0.1)
    monkeypatch.undo()
    assert state_of(lost) == "REMOVED"


def test_a_search_that_stopped_trials_waits_for_their_controllers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is about to die may reserve once more."""
    monkeypatch.setattr(placement_group_cleanup, "QUIET_S", 0.5)
    dying = Controller.remote()
    ray.get(dying.__ray_ready__.remote())
    late: list[str] = []

    def reserve_and_die() -> None:
        time.sleep(1.5)
        late.append(ray.get(dying.reserve.remote()))
        ray.kill(dying)

    thread = threading.Thread(target=reserve_and_die)
    thread.start()
    placement_group_cleanup.remove_last_groups()
    thread.join()
    assert state_of(late[0]) == "REMOVED"
