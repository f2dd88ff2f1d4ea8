"""Faults at chosen moments of a run's workers, for `bench/survival.py` and the tests.

`worker` replaces the function that `fit` runs in every worker. It reads a plan beside the run's
folder, prepares the faults, and calls the real function. Every fault happens once, also when the run
starts again. Steps and faults are logged with their times. No module of the package knows of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

KINDS = ("start-up", "mid-step", "evaluation", "checkpoint", "torn checkpoint", "full disk")
WORK = ("step", "evaluating")
FULL_AT_BYTES = 200_000  # less than any checkpoint here, more than a log file


def plan_faults(
    folder: str | Path,
    faults: Sequence[Mapping[str, Any]],
    *,
    pace_s: float = 0.0,
    pace_alone_s: float = 0.0,
) -> None:
    """Writes the plan of faults for a run that has not begun.

    Args:
        folder: of the run.
        faults: each a "kind" of `KINDS`, the "rank" of the worker, and "at": the step of the run
            (from 1) during which it strikes, or after which ("checkpoint", "evaluation");
            "start-up" has none.
        pace_s: that every step waits, for faults from outside that take their time.
        pace_alone_s: that a step waits while the run has but one worker.
    """
    path = Path(f"{folder}.faults")
    path.mkdir(parents=True)
    plan = {
        "faults": [dict(fault) for fault in faults],
        "pace_s": pace_s,
        "pace_alone_s": pace_alone_s,
    }
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "events.jsonl").touch()


def events_of(folder: str | Path) -> list[dict[str, Any]]:
    """The logged events in the order of their times.

    An event has "event" ("step" or "evaluating", which the first worker logs as they begin, or the kind
    of a fault), "at" (the step), "time" (seconds) and "pid" (the process that logged it). A step also
    has "workers" (their number).
    """
    lines = (Path(f"{folder}.faults") / "events.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda event: event["time"])


def log_event(folder: str | Path, event: str, at: int | None, **more: Any) -> None:
    values = {"event": event, "at": at, "time": time.time(), "pid": os.getpid(), **more}
    line = json.dumps(values) + "\n"
    file = os.open(Path(f"{folder}.faults") / "events.jsonl", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in every Ray Train worker: prepares its faults, then does a worker's work."""
    from repmtl_ray.runs.worker import run_worker

    _arm(Path(config["directory"]))
    return run_worker(config)


def damage_newest_checkpoint(folder: Path) -> None:
    """Cuts the newest state in the middle and keeps its marker, as a disk without a flush or an
    unfinished copy would."""
    names = sorted(path.parent.name for path in folder.glob("checkpoint_*/complete.json"))
    if names:
        state = folder / names[-1] / "state.pt"
        os.truncate(state, state.stat().st_size // 2)


def kill_with_children(pid: int) -> None:
    """Kills a process and all its descendants, as when a machine loses its power.

    Some of them may end by themselves meanwhile.
    """
    process = psutil.Process(pid)
    for each in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def _arm(folder: Path) -> None:
    """Puts this process's faults into the functions in which they happen."""
    from repmtl_ray import collectives, storage
    from repmtl_ray.runs import checkpoint, fault_tolerance, loop
    from repmtl_ray.runs.step import Stepper

    plan = json.loads((Path(f"{folder}.faults") / "plan.json").read_text())
    workers = collectives.current()
    rank = workers.rank
    start, step = fault_tolerance.FaultTolerance.start, Stepper.step
    load, evaluate, write = checkpoint.load, loop.evaluate_split, storage.write
    now = {"step": 0}

    def armed(kind: str, at: int | None) -> bool:
        """Whether this fault is planned for this moment. True only once per fault."""
        for number, fault in enumerate(plan["faults"]):
            if (fault["kind"], fault.get("at"), fault["rank"]) == (kind, at, rank):
                with contextlib.suppress(FileExistsError):
                    (Path(f"{folder}.faults") / f"struck-{number}").touch(exist_ok=False)
                    log_event(folder, kind, at)
                    return True
        return False

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty_start(self: Any) -> str | None:
        if armed("start-up", None):
            die()
        return start(self)

    def faulty_step(self: Any, batch: Any, *, global_step: int) -> dict[str, float]:
        time.sleep(plan["pace_s"] + (workers.size == 1) * plan["pace_alone_s"])
        now["step"] = global_step + 1
        if rank == 0:
            log_event(folder, "step", now["step"], workers=workers.size)
        if armed("mid-step", now["step"]):
            die()
        if armed("torn checkpoint", now["step"]):
            damage_newest_checkpoint(folder)
            die()
        if armed("full disk", now["step"]):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, hard))
        return step(self, batch, global_step=global_step)

    def noted_load(*arguments: Any, **named: Any) -> checkpoint.Progress:
        progress = load(*arguments, **named)
        now["step"] = progress.global_step  # a resumed epoch may begin with its evaluation
        return progress

    def faulty_evaluate(*arguments: Any, **named: Any) -> dict[str, float]:
        if rank == 0:
            log_event(folder, "evaluating", now["step"])
        found = evaluate(*arguments, **named)
        if armed("evaluation", now["step"]):
            die()
        return found

    def faulty_write(location: str, data: bytes) -> None:
        if location.endswith("state.pt") and armed("checkpoint", now["step"]):
            path = Path(
                location
            )  # half of the file under its final name, which our own drafts never have
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[: len(data) // 2])
            die()
        write(location, data)

    fault_tolerance.FaultTolerance.start = faulty_start  # type: ignore[method-assign]
    Stepper.step = faulty_step  # type: ignore[method-assign]
    checkpoint.load = noted_load
    loop.evaluate_split = faulty_evaluate
    storage.write = faulty_write
