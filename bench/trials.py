"""What a trial costs besides its epochs: with one worker in the trial's own process, and in Ray Train.

    python -m bench.trials [--trials 4] [--epochs 6] [--storage DIR]

Both ways train the same trials one after the other on one core, in one Ray, and must report the same
numbers to the last digit. The overhead of a trial is the time between the last report of the trial
before it (for the first one: the start of the search, whose baselines are trained already) and its own
last report, without its epochs; an epoch is the median time between two reports. Takes about five
minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

from ray import tune as ray_tune

from bench.survival import EXPERIMENT, connect
from repmtl_ray import Placement, tune
from repmtl_ray.config import Experiment, replace
from repmtl_ray.search import SearchResult, study

RATE = "optimizer.learning_rate"


def reports(directory: Path) -> list[list[float]]:
    """When every trial reported its epochs, in the order of the trials' ends."""
    trials = []
    for file in directory.glob("search-*/*/result.json"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        trials.append([float(row["timestamp"]) for row in rows])
    return sorted(trials, key=lambda times: times[-1])


def overheads(trials: list[list[float]], start: float) -> list[float]:
    """Seconds of every trial that its epochs do not explain."""
    ends = [start, *(times[-1] for times in trials)]
    costs = []
    for (before, end), times in zip(itertools.pairwise(ends), trials, strict=True):
        epoch_s = median(late - early for early, late in itertools.pairwise(times))
        costs.append(end - before - len(times) * epoch_s)
    return costs


def searched(
    experiment: Experiment, num_trials: int, storage: Path, *, in_process: bool
) -> tuple[SearchResult, list[float], float]:
    """A search's result, the overheads of its trials, and its seconds."""
    name = "in-process" if in_process else "ray-train"
    rates = [0.01 * 0.9**number for number in range(num_trials)]
    start = time.time()
    with mock.patch.object(study, "trains_in_process", return_value=in_process):
        found = tune(
            experiment,
            {RATE: ray_tune.grid_search(rates)},
            num_samples=1,
            placement=Placement(),
            max_concurrent=1,
            storage=str(storage),
            name=name,
        )
    seconds = time.time() - start
    return found, overheads(reports(storage / name), start), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--storage", help="folder for the searches (default: a temporary one)")
    arguments = parser.parse_args()
    storage = Path(tempfile.mkdtemp(prefix="trials-", dir=arguments.storage))
    experiment = replace(EXPERIMENT, {"epochs": arguments.epochs})
    connect()
    tune(  # trains the baselines
        experiment, {RATE: ray_tune.grid_search([0.02])}, num_samples=1, storage=str(storage)
    )
    print("\n| trials | first, s | later, s (median) | search, s |\n|---|---|---|---|")
    tables = []
    for label, in_process in (("in their own process", True), ("in Ray Train", False)):
        found, costs, seconds = searched(
            experiment, arguments.trials, storage, in_process=in_process
        )
        print(f"| {label} | {costs[0]:.1f} | {median(costs[1:]):.1f} | {seconds:.0f} |", flush=True)
        tables.append(found.table.drop(columns=["checkpoint"]))
    print(f"\nequal to the last digit: {tables[0].equals(tables[1])}")


if __name__ == "__main__":
    main()
