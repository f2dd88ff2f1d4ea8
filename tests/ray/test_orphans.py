"""What a killed actor had reserved is given back; what a living one has reserved stays."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group

from repmtl_ray.search.orphans import remove_orphans

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Controller:
    def reserve(self) -> str:
        self.group = placement_group([{"CPU": 1}])
        ray.get(self.group.ready())
        return self.group.id.hex()


def state_of(group: str) -> str:
    return ray.util.placement_group_table()[group]["state"]


def test_a_dead_actors_group_is_removed_and_a_living_ones_is_not():
    dead, living = Controller.remote(), Controller.remote()
    lost, kept = ray.get([dead.reserve.remote(), living.reserve.remote()])
    own = placement_group([{"CPU": 1}])
    ray.kill(dead)
    deadline = time.monotonic() + 120
    while state_of(lost) != "REMOVED" and time.monotonic() < deadline:
        remove_orphans()
        time.sleep(0.1)
    assert state_of(lost) == "REMOVED"
    assert state_of(kept) == "CREATED"
    assert state_of(own.id.hex()) == "CREATED"
    ray.kill(living)
    while remove_orphans() and time.monotonic() < deadline:
        time.sleep(0.1)
    ray.util.remove_placement_group(own)
    assert remove_orphans() == 0
