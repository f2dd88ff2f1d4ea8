"""What a user sees when a run loses a worker: one line in place of three screens of Ray's.

Owns the way from the processes that know (Ray Train's controller which worker, the first worker how
far the run was and which checkpoint it continues from) to the process that prints. They meet in the
key-value store of Ray's head, which every process of a cluster reaches.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.train import UserCallback

from repmtl_ray import ray_compat

if TYPE_CHECKING:
    from ray.train.v2.api.context import TrainRunContext  # type: ignore[attr-defined]

POLL_S = 0.5
STEP_S = 1.0
"""Between two notes of the step that a run has reached."""
RAYS_TEXT = "A worker died or was killed while executing a task"


def _key(folder: str, what: str) -> str:
    return f"{folder}\n{what}"


def _put(folder: str, what: str, value: Any) -> None:
    ray_compat.put_value(_key(folder, what), json.dumps(value))


def _get(key: str) -> Any:
    value = ray_compat.get_value(key)
    return None if value is None else json.loads(value)


class RunPosition:
    """Notes how far a run is, in its first worker.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._next = 0.0

    def note_start(self, checkpoint: str | None) -> None:
        """The run starts, from a checkpoint or anew."""
        _put(self._folder, "start", {"time": time.time(), "checkpoint": checkpoint})

    def note_step(self, global_step: int) -> None:
        """So many steps are done; noted at most every `STEP_S` seconds."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + STEP_S
            _put(self._folder, "step", global_step)


def note_loss(folder: str, number: int, ranks: Sequence[int]) -> None:
    """Notes that workers of a run are gone.

    Args:
        folder: of the run.
        number: of this loss among the run's.
        ranks: of the workers.
    """
    step = _get(_key(folder, "step"))
    _put(folder, f"loss {number}", {"time": time.time(), "ranks": sorted(ranks), "step": step})


class NoteLosses(UserCallback):
    """Notes which workers failed, in Ray Train's controller.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._num_losses = 0

    def after_exception(
        self, run_context: TrainRunContext, worker_exceptions: dict[int, Exception]
    ) -> None:
        lost = [
            rank for rank, error in worker_exceptions.items() if ray_compat.is_worker_loss(error)
        ]
        if lost:
            self._num_losses += 1
            note_loss(self._folder, self._num_losses, lost)


class LossPrinter:
    """Prints one line for every loss of the runs below a folder.

    Args:
        folder: of a run, or one that has runs below it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._printed: set[str] = set(self._keys())  # of an earlier process

    def poll(self, *, is_last: bool = False) -> None:
        """Prints what is new; a loss is shown when its run has started again.

        Args:
            is_last: whether nothing starts again, so that nothing is waited for.
        """
        for key in self._keys():
            if key in self._printed:
                continue
            folder = key.partition("\n")[0]
            loss, start = _get(key), _get(_key(folder, "start"))
            if start is not None and start["time"] > loss["time"]:
                name = (start["checkpoint"] or "").rpartition("/")[2]
                onward = f"continues from {name}" if name else "starts anew: it had no checkpoint"
            elif is_last:
                onward = "does not continue"
            else:
                continue
            self._printed.add(key)
            workers = ", ".join(str(rank) for rank in loss["ranks"])
            step = "before its first step" if loss["step"] is None else f"at step {loss['step']}"
            run = folder.rpartition("/")[2]
            print(f"worker {workers} of run {run} was lost {step}; the run {onward}", flush=True)

    def _keys(self) -> list[str]:
        return [key for key in ray_compat.keys_of_values(self._folder) if "\nloss " in key]


@contextlib.contextmanager
def losses_printed(folder: str) -> Iterator[None]:
    """Inside the block, losses below a folder are one line each, and Ray's own text is left out."""
    printer, ended = LossPrinter(folder), threading.Event()
    # A Ray that was stopped, for example by Ctrl-C, has nothing to tell.
    unreachable = contextlib.suppress(ray.exceptions.RayError, RuntimeError)

    def watch() -> None:
        while not ended.wait(POLL_S):
            with unreachable:
                printer.poll()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with ray_compat.driver_text_without(RAYS_TEXT):
            yield
    finally:
        ended.set()
        thread.join()
        with unreachable:
            printer.poll(is_last=True)
