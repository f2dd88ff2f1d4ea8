"""Many trials that ASHA stops early, and what they leave behind in the cluster and on the machine.

    python -m bench.stops [--trials 50] [--storage DIR]

Searches over learning rates of which all but the first learn nothing. Counts placement groups, actors
of Ray Train, processes and listening ports before and after the search. What is left after 60 s is a
leak (Ray issue 54305 is a known one). Trials have one worker, which trains in the
trial's own process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from unittest import mock

import psutil
import ray
from ray import tune as ray_tune
from ray.util.state import list_actors

from bench.survival import EXPERIMENT, connect
from repmtl_ray import tune
from repmtl_ray.config import replace

PATIENCE_S = 60.0


def counts() -> dict[str, int]:
    """Counts what a trial makes. Ray's idle workers change by themselves and are left out."""
    groups = ray.util.placement_group_table().values()
    # Ray's state functions prefer this variable to their own argument, and look for any Ray at "local".
    with mock.patch.dict(os.environ, RAY_ADDRESS=ray.get_runtime_context().gcs_address):
        actors = list_actors(filters=[("state", "=", "ALIVE")], limit=10_000)
    children = psutil.Process(os.getpid()).children(recursive=True)
    workers = [child for child in children if _title(child).startswith("ray::")]
    busy = [child for child in workers if _is_of_a_run(_title(child))]
    listening = [child for child in busy if _listens(child)]
    return {
        "placement groups": sum(group["state"] != "REMOVED" for group in groups),
        "actors of Ray Train": sum(_is_of_a_run(actor.class_name) for actor in actors),
        "processes of runs": len(busy),
        "of them listening": len(listening),
    }


def _is_of_a_run(name: str) -> bool:
    """Whether an actor belongs to a run; Ray Train keeps one TrainStateActor for the whole cluster."""
    of_train = "Train" in name.replace("TrainStateActor", "")
    return (
        of_train
        or "PlacementGroupCleaner" in name
        or name.endswith(("ImplicitFunc", "InProcessTrial"))
    )


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _listens(process: psutil.Process) -> bool:
    try:
        return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--storage", help="folder for the search (default: a temporary one)")
    arguments = parser.parse_args()
    connect()
    before = counts()
    rates = [0.01, *(1e-7 * 0.9**number for number in range(arguments.trials - 1))]
    start = time.monotonic()
    found = tune(
        replace(EXPERIMENT, {"epochs": 4, "data.num_train": 8}),
        {"optimizer.learning_rate": ray_tune.grid_search(rates)},
        num_samples=1,
        scheduler="asha",
        max_concurrent=2,
        storage=tempfile.mkdtemp(prefix="stops-", dir=arguments.storage),
    )
    seconds = time.monotonic() - start
    deadline = time.monotonic() + PATIENCE_S
    while counts() != before and time.monotonic() < deadline:
        time.sleep(1)
    after = counts()
    ended = found.table["status"].value_counts().to_dict()
    print(
        f"{arguments.trials} trials in {seconds:.0f} s: {ended}\n\n| | before | after |\n|---|---|---|"
    )
    for name, count in before.items():
        print(f"| {name} | {count} | {after[name]} |")
    for group in ray.util.placement_group_table().values():
        if group["state"] != "REMOVED":
            print(f"left: {group}")


if __name__ == "__main__":
    main()
