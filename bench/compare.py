"""How much slower or faster a commit is than another: paired ratios of one run.

    python -m bench.compare BASE HEAD [--rounds 5] [--measures step FairGrad data start trial]

Both commits are checked out beside each other, and each measure runs in processes of BASE and HEAD in
turn, so that a slow moment of the machine affects both. A ratio is HEAD's time over BASE's, the median
of the pairs; the range is that of all pairs. Times are processor times, except those of trials. Exits
with status 1 if a median is above `--limit`. The measures run this file's code against the packages of
the two commits.

step: Rep-MTL's step as printed. A policy's name: its step. data: batches of rendered streets, augmented.
start: a process from its start to the end of one step. trial: `bench.trials` of each commit, the time of
later trials besides their epochs (needs Ray, takes minutes; not among the defaults).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("step", "FairGrad", "PCGrad", "UW", "data", "start")


def measured(measure: str, repeats: int) -> float:
    """Seconds in this process, with the package that it finds."""
    if measure == "data":
        return _median(_data(), repeats)
    if measure == "start":
        _step_of("EW", penalized=False)()
        return time.process_time()
    penalized = measure == "step"
    return _median(_step_of("EW" if penalized else measure, penalized=penalized), repeats)


def _median(function: Callable[[], None], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def _step_of(policy: str, *, penalized: bool) -> Callable[[], None]:
    import torch

    from bench import policies as bench
    from repmtl_ray.regularizers import RepMTL

    torch.set_num_threads(1)
    arguments = argparse.Namespace(encoder="resnet10t", size=32, batch_size=8, device="cpu")
    stepper, batch = bench.stepper_of(policy, arguments), bench.batch_of(arguments)
    if penalized:
        object.__setattr__(stepper, "regularizer", RepMTL())
    stepper.policy.begin_epoch(0)
    steps = iter(range(10**9))

    def run() -> None:
        stepper.step(batch, global_step=next(steps))

    return run


def _data() -> Callable[[], None]:
    import torch

    from repmtl_ray.collectives import ALONE
    from repmtl_ray.config import DataConfig
    from repmtl_ray.data.batches import LocalRows, train_batches
    from repmtl_ray.data.sources import open_streams

    config = DataConfig(name="cityscapes", height=32, width=64, num_train=32, num_val=1)
    streams = open_streams(config, "train")
    rows = {stream.name: LocalRows(stream) for stream in streams}
    epochs = iter(range(10**9))

    def run() -> None:
        batches = train_batches(
            streams,
            rows,
            tasks=("segmentation", "depth"),
            batch_size=8,
            seed=0,
            epoch=next(epochs),
            workers=ALONE,
            augment=True,
            dtype=torch.float32,
        )
        assert sum(1 for _ in batches) == 4

    return run


def in_fresh_process(checkout: Path, measure: str, repeats: int) -> float:
    """Seconds that a measure takes with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    if measure == "trial":
        command = [sys.executable, "-m", "bench.trials", "--trials", "3"]
    else:
        command = [sys.executable, __file__, "--one", measure, "--repeats", str(repeats)]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{measure} of {checkout.name} failed:\n{done.stderr[-2000:]}")
    if measure == "trial":
        found = re.search(r"in their own process \| [\d.]+ \| ([\d.]+)", done.stdout)
        if found is None:
            raise SystemExit(f"bench.trials of {checkout.name} printed no table:\n{done.stdout}")
        return float(found[1])
    return float(json.loads(done.stdout.splitlines()[-1]))


def checked_out(folder: Path, name: str, commit: str) -> Path:
    """The files of a commit in a folder; the repository itself stays as it is."""
    place = folder / name
    place.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"{commit!r} is no commit of this repository: {archive.stderr.decode()}")
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    return place


def compared(base: Path, head: Path, measure: str, rounds: int, repeats: int) -> list[float]:
    """HEAD's seconds over BASE's, by pair; every other pair begins with HEAD."""
    ratios = []
    for number in range(rounds):
        seconds = {}
        for checkout in (base, head) if number % 2 == 0 else (head, base):
            seconds[checkout] = in_fresh_process(checkout, measure, repeats)
        ratios.append(seconds[head] / seconds[base])
    return ratios


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?")
    parser.add_argument("head", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="in each process")
    parser.add_argument("--measures", nargs="+", default=list(DEFAULT))
    parser.add_argument("--limit", type=float, default=1.1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measured(given.one, given.repeats)))
        return 0
    if given.base is None or given.head is None:
        parser.error("name two commits: BASE HEAD")
    slower = []
    with tempfile.TemporaryDirectory() as folder:
        base = checked_out(Path(folder), "base", given.base)
        head = checked_out(Path(folder), "head", given.head)
        print("| measure | HEAD / BASE | range |\n|---|---|---|")
        for measure in given.measures:
            ratios = compared(base, head, measure, given.rounds, given.repeats)
            median = statistics.median(ratios)
            print(
                f"| {measure} | {median:.2f} | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True
            )
            if median > given.limit:
                slower.append(measure)
    if slower:
        print(f"\nslower than {given.limit:g} times BASE: {', '.join(slower)}")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
