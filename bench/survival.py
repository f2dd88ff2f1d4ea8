"""The campaign of faults: runs with faults at random moments, compared with an undisturbed run.

    python -m bench.survival [--seed 0] [--runs 0 1 2 3] [--storage DIR]
                             [--parts workers drivers clusters preemption arrival]

Prints a Markdown table with one row per fault. The columns are the kind of fault, its moment, whether
the run ended with its result, the steps that were taken again, the seconds from the fault to the first
step after it, and whether the final weights and all metrics equal those of the undisturbed run to the
bit ("to 1e-6" means that the metrics agree to this tolerance). The parts are:

    workers      several faults per run: SIGKILL, torn files, or a full disk (`bench/faults.py`)
    drivers      the process that called `fit` dies, and `fit` is called again with the same name
    clusters     the same with all of Ray
    preemption   a node is announced to go and goes while the run trains (`bench/nodes.py`)
    arrival      another node comes while the run trains

The moments follow from seed, part and number, so the runs can be done separately. Takes about 20
minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

from bench import faults, nodes
from repmtl_ray import cluster, train
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.placement import Placement
from repmtl_ray.runs.checkpoint import read_state
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.train import FitResult, fit

YES, NO = "yes", "**no**"
PARTS = ("workers", "drivers", "clusters", "preemption", "arrival")
EPOCHS, STEPS = 3, 8
EXPERIMENT = Experiment(
    data=DataConfig(name="cityscapes", height=32, width=64, num_train=32, num_val=8, augment=True),
    model=ModelConfig(encoder="test_efficientnet", head="linear", dropout=0.0),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.01),
    epochs=EPOCHS,
    batch_size=4,
    precision="float64",  # so that a changing number of workers can be compared too
)
SAVING = CheckpointConfig(every_steps=3)
HEADER = (
    "| kind | at step | survived | steps again | seconds to recover | bit-equal |\n"
    "|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault and its consequences."""

    part: str
    kind: str
    at: int
    survived: bool
    lost: int
    seconds: float
    equal: str

    def __str__(self) -> str:
        return (
            f"| {self.kind} | {self.at} | {YES if self.survived else NO} | {self.lost} | {self.seconds:.0f} "
            f"| {self.equal} |"
        )


def trained(storage: Path, name: str, workers: int | tuple[int, int] = 2) -> FitResult:
    return fit(
        EXPERIMENT,
        placement=Placement(num_workers=workers),
        storage=storage,
        name=name,
        max_failures=10,
        checkpoints=SAVING,
    )


def how_equal(one: FitResult | None, other: FitResult) -> str:
    """How equal two runs are in the metrics of all epochs and in every tensor of their checkpoints."""
    if one is None:
        return NO
    states = [read_state(result.checkpoint) for result in (one, other)]
    if one.history == other.history and same(*states):
        return YES
    return "to 1e-6" if close(one, other) else NO


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def close(one: FitResult, other: FitResult) -> bool:
    """Whether two runs agree as promised when the number of workers changes."""
    pairs = zip(one.history, other.history, strict=True)
    return all(math.isclose(a[n], b[n], rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs for n in b)


def rows_of(part: str, folder: Path, result: FitResult | None, undisturbed: FitResult) -> list[Row]:
    """The rows of a run, from the log of its workers."""
    events = faults.events_of(folder)
    equals = how_equal(result, undisturbed)
    rows = []
    for number, event in enumerate(events):
        if event["event"] in faults.WORK:
            continue
        work = [e for e in events[:number] if e["event"] in faults.WORK]
        at_work = work[-1]["pid"] if work else None  # in the group of workers that had the fault
        after = [e for e in events[number:] if e["event"] in faults.WORK and e["pid"] != at_work]
        done = max((e["at"] for e in work if e["event"] == "step"), default=1) - 1
        if event["event"] in ("checkpoint", "evaluation"):
            done = event["at"]
        elif event["event"] in ("mid-step", "torn checkpoint"):
            done = event["at"] - 1
        elif event["event"] == "full disk":
            done = (done // STEPS + 1) * STEPS  # the run ended with the epoch
        first = after[0] if after else None
        again = 0 if first is None else done - first["at"] + (first["event"] == "step")
        rows.append(
            Row(
                part=part,
                kind=event["event"],
                at=event["at"] or done,
                survived=result is not None,
                lost=max(0, again),
                seconds=0.0 if first is None else first["time"] - event["time"],
                equal=equals,
            )
        )
    return rows


def random_faults(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Four faults of one run at increasing steps; the kinds take turns."""
    kinds = [faults.KINDS[(number + offset) % len(faults.KINDS)] for offset in (0, 1, 3, 4)]
    total = EPOCHS * STEPS
    moments = sorted(rng.sample(range(2, total), len(kinds)))
    planned = []
    for kind, at in zip(kinds, moments, strict=True):
        fault: dict[str, Any] = {"kind": kind, "rank": rng.randrange(2), "at": at}
        if kind in ("checkpoint", "full disk", "torn checkpoint"):
            fault["rank"] = 0  # the worker that writes
        if kind == "checkpoint":
            fault["at"] = STEPS * rng.randint(
                1, EPOCHS
            )  # a checkpoint is written there in any case
        elif kind == "evaluation":
            fault["at"] = STEPS * rng.randint(1, EPOCHS)
        elif kind == "start-up":
            fault["at"] = None
        planned.append(fault)
    return planned


def faults_in_workers(
    storage: Path, rng: random.Random, number: int, undisturbed: FitResult
) -> list[Row]:
    """Faults inside workers, which Ray replaces. A full disk ends the run, and it is started again."""
    folder = storage / f"workers-{number}"
    faults.plan_faults(folder, random_faults(rng, number))
    with mock.patch.object(train, "run_worker", faults.worker):
        result = _until_done(storage, folder.name)
    return rows_of("workers", folder, result, undisturbed)


def _until_done(storage: Path, name: str) -> FitResult | None:
    """Starts the run again after an end that names the storage, as if somebody had made room."""
    for _ in range(3):
        try:
            return trained(storage, name)
        except ValueError as error:
            if "start under the same name" not in str(error):
                raise
            print(f"  (the run ended with: {error})", file=sys.stderr)
    return None


CHILD = """
import os, sys
from pathlib import Path
from bench import faults, survival
from repmtl_ray import train
train.run_worker = faults.worker
survival.trained(Path(sys.argv[1]), sys.argv[2])
"""


def killed_driver(
    part: str, storage: Path, number: int, at: int, undisturbed: FitResult
) -> list[Row]:
    """Kills the process of a `fit` when a step is reached, and calls `fit` again here."""
    folder = storage / f"{part}-{number}"
    faults.plan_faults(folder, [])
    address = "local" if part == "clusters" else ray.get_runtime_context().gcs_address
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(storage), folder.name],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not any(e["event"] == "step" and e["at"] >= at for e in faults.events_of(folder)):
        if child.poll() is not None:
            raise RuntimeError("the run ended before it could be interrupted")
        time.sleep(0.05)
    faults.log_event(folder, "driver" if part == "drivers" else "whole cluster", at)
    if part == "clusters":
        faults.kill_with_children(child.pid)
    else:
        child.kill()
    child.wait()
    with mock.patch.object(train, "run_worker", faults.worker):
        result = trained(storage, folder.name)
    return rows_of(part, folder, result, undisturbed)


def campaign(arguments: argparse.Namespace) -> Iterator[Row]:
    """The requested parts and runs in order. A run of one seed is the same, whichever others run."""
    storage = Path(tempfile.mkdtemp(prefix="survival-", dir=arguments.storage))
    connect()
    undisturbed = trained(storage, "undisturbed")
    for part, number in itertools.product(arguments.parts, arguments.runs):
        rng = random.Random(f"{arguments.seed} {part} {number}")
        at = rng.randint(2, EPOCHS * STEPS - 6)
        if part in ("preemption", "arrival"):
            ray.shutdown()
            folder = storage / f"{part}-{number}"
            run = functools.partial(trained, storage, folder.name)
            early = min(at, STEPS)
            if part == "preemption":
                result = nodes.preempted(run, folder, early, elastic=number % 2 == 1)
            else:
                result = nodes.arrived(run, folder, early)
            yield from rows_of(part, folder, result, undisturbed)
            continue
        connect()
        if part == "workers":
            yield from faults_in_workers(storage, rng, number, undisturbed)
        else:
            yield from killed_driver(part, storage, number, at, undisturbed)


def set_environment() -> None:
    """Sets the environment of Ray's processes before Ray starts."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.update(cluster.LOCAL_ENVIRONMENT)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "60"


def connect() -> None:
    """Starts a Ray for this process; the second driver of a part joins it."""
    set_environment()
    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=256 * 2**20,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=int, nargs="+", default=[0, 1, 2, 3], help="which of each part, by number"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--storage", help="folder for the runs (default: a temporary one)")
    arguments = parser.parse_args()
    rows = []
    for row in campaign(arguments):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    survived, equals = sum(row.survived for row in rows), sum(row.equal == YES for row in rows)
    print("\n".join(["", HEADER, *map(str, rows), ""]))
    print(f"{len(rows)} faults, {survived} survived, {equals} bit-equal (seed {arguments.seed}).")


if __name__ == "__main__":
    main()
