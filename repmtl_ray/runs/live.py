"""What a user sees of a run while it trains: a line for every epoch, and a bar in a terminal.

Owns the way from the run's first worker, which knows, to the process that prints. They meet in the
key-value store of Ray's head, as in `worker_loss.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from repmtl_ray import ray_compat
from repmtl_ray.runs.callbacks import Callback, RunContext, StepInfo

POLL_S = 0.5
PENALTIES = ("rep_mtl/tsr", "rep_mtl/csa")


class NoteProgress(Callback):
    """Notes every epoch and, twice a second, the step, in a run's first worker."""

    def on_run_start(self, context: RunContext) -> None:
        self._folder, self._attempt = context.folder, uuid.uuid4().hex
        self._steps, self._epochs = context.steps_per_epoch, context.experiment.epochs
        self._num_workers, self._next = context.workers.size, 0.0
        self._num_samples, self._waited_s, self._begin = 0, 0.0, time.monotonic()
        self._note("step", {"global_step": context.progress.global_step})

    def on_step_end(self, step: StepInfo) -> None:
        self._num_samples += step.num_samples * self._num_workers
        self._waited_s += step.wait_seconds
        now = time.monotonic()
        if now >= self._next:
            self._next = now + POLL_S
            losses = {n: v for n, v in step.metrics.items() if n.endswith("/train_loss")}
            self._note("step", {"global_step": step.global_step, "losses": losses})

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        seconds = time.monotonic() - self._begin
        epoch = int(metrics["epoch"])
        self._note("step", {"global_step": int(metrics["global_step"])})
        found = {
            "seconds": seconds,
            "samples": self._num_samples,
            "waited": self._waited_s,
            "metrics": dict(metrics),
        }
        self._note(f"epoch {epoch:06d}", found)
        self._num_samples, self._waited_s, self._begin = 0, 0.0, time.monotonic()

    def _note(self, what: str, found: Mapping[str, Any]) -> None:
        total = {"attempt": self._attempt, "steps": self._steps, "epochs": self._epochs}
        ray_compat.put_value(f"{self._folder}\nlive {what}", json.dumps({**total, **found}))


class Lines:
    """Prints what was noted of a run: lines, and in a terminal a bar below them.

    Args:
        has_bar: whether the output is a terminal.
    """

    def __init__(self, *, has_bar: bool) -> None:
        self._bar: Any = None
        self._has_bar = has_bar
        self._seconds: list[float] = []

    def show(self, what: str, found: Mapping[str, Any]) -> None:
        """Shows a note that is new.

        Args:
            what: "step", or "epoch N".
            found: as `NoteProgress` notes it.
        """
        if what != "step":
            self._print(epoch_line(found, self._seconds))
        elif self._has_bar:
            self._move(found)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)

    def _move(self, found: Mapping[str, Any]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            total = found["steps"] * found["epochs"]
            first = found["global_step"]
            self._bar = tqdm(total=total, initial=first, unit=" steps", dynamic_ncols=True)
        self._bar.n = found["global_step"]
        losses = {name.partition("/")[0]: f"{v:.3g}" for name, v in found.get("losses", {}).items()}
        self._bar.set_postfix(losses, refresh=False)
        self._bar.refresh()


def epoch_line(found: Mapping[str, Any], seconds: list[float]) -> str:
    """The line of an epoch: its number, the time that is left, samples per second, the
    share of the time that steps waited for data, the metrics.

    Args:
        found: as `NoteProgress` notes it.
        seconds: of the epochs before; this one's are added.
    """
    metrics, epochs = found["metrics"], found["epochs"]
    seconds.append(found["seconds"])
    epoch = int(metrics["epoch"])
    left = sum(seconds) / len(seconds) * (epochs - epoch)
    rate = found["samples"] / max(found["seconds"], 1e-9)
    return "  ".join(
        [
            f"epoch {epoch}/{epochs}",
            f"{duration(left)} left" if epoch < epochs else f"took {duration(sum(seconds))}",
            f"{rate:.3g} samples/s",
            f"{100 * found['waited'] / max(found['seconds'], 1e-9):.0f} % waiting for data",
            *metric_words(metrics),
        ]
    )


def metric_words(metrics: Mapping[str, float]) -> list[str]:
    """The losses, penalties and task metrics of an epoch, in their order.

    Diagnostics and what a policy reports would fill the line; the history and loggers have them.
    """
    return [
        f"{name} {value:.4g}"
        for name, value in metrics.items()
        if "delta" in name
        or name in PENALTIES
        or ("/" in name and not name.startswith(("policy/", "rep_mtl/")))
    ]


def duration(seconds: float) -> str:
    """Seconds as people say them: "12 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def progress_printed(folder: str) -> Iterator[None]:
    """Inside the block, the progress of a run whose first worker has `NoteProgress` is printed."""
    lines, ended = Lines(has_bar=sys.stderr.isatty()), threading.Event()
    prefix = f"{folder}\nlive "
    seen: dict[str, str | None] = {}
    # A Ray that was stopped, for example by Ctrl-C, has nothing to tell.
    unreachable = contextlib.suppress(ray.exceptions.RayError, RuntimeError)

    def poll(*, is_first: bool = False) -> None:
        for key in ray_compat.keys_of_values(prefix):
            value = ray_compat.get_value(key)
            if value is not None and seen.get(key) != value:
                seen[key] = value
                if not is_first:  # else of an earlier process
                    lines.show(key.removeprefix(prefix), json.loads(value))

    def watch() -> None:
        while not ended.wait(POLL_S):
            with unreachable:
                poll()

    with unreachable:
        poll(is_first=True)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with unreachable:
            poll()
        lines.close()
