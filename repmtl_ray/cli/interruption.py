"""Ctrl-C, SIGTERM and a closed terminal in a command: stop, say how to continue, exit code 130.

Owns the commands' signal handlers. The first signal raises KeyboardInterrupt in the main thread, which
leaves every folder with its status and without its lock; a second signal kills what still runs at
once. If the process has not ended after `GRACE_S`, a thread ends it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from repmtl_ray import run_lock
from repmtl_ray.cli.invocation import program_words

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
GRACE_S = 6.0
EXIT_CODE = 130
_received: list[int] = []


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Takes the signals inside the block; a SIGHUP that is ignored (nohup) stays ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if number == signal.SIGINT or handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _end(interrupt)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: Any) -> None:
    _received.append(number)
    if len(_received) > 1:
        _kill_children()
        return
    threading.Thread(target=_end_late, daemon=True).start()
    raise KeyboardInterrupt


def _end(interrupt: KeyboardInterrupt) -> NoReturn:
    """Says how to continue, stops Ray, and ends the process."""
    if isinstance(interrupt, run_lock.Interrupted):
        _say(interrupt.kind, interrupt.directory)
    else:
        _say("", "")
    if "ray" in sys.modules:
        import ray

        with contextlib.suppress(Exception):  # nothing may keep the process alive
            ray.shutdown()
    _exit()


def _end_late() -> None:
    """In a thread of its own: ends a process that did not end by itself."""
    time.sleep(GRACE_S)
    places = run_lock.abandon()
    for kind, directory in places[:1]:
        _say(kind, directory)
    _exit()


def _exit() -> NoReturn:
    _kill_children()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_CODE)


def _kill_children() -> None:
    """Ray's processes are children of the process that started it; a cluster that was joined is not."""
    with contextlib.suppress(ImportError):
        import psutil  # Ray brings it

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()


def _say(kind: str, directory: str) -> None:
    name = signal.Signals(_received[0]).name if _received else "SIGINT"
    kept = (
        f"the {kind} is in {directory}; what was finished is kept"
        if kind
        else "nothing was trained"
    )
    text = f"\ninterrupted ({name}): {kept}. Continue with:\n  {command(sys.argv, kind, directory)}"
    with contextlib.suppress(OSError, ValueError):  # the terminal may be closed
        print(text, file=sys.stderr, flush=True)


def command(arguments: Sequence[str], kind: str, directory: str) -> str:
    """The command line that continues what a command line began.

    Args:
        arguments: of the process (`sys.argv`).
        kind: what it began ("run", "search", "benchmark", "preparation"); empty if nothing yet.
        directory: of the run or the study; its last part is the name.
    """
    option = {"run": "--name", "search": "--resume", "benchmark": "--resume"}.get(kind)
    words = list(arguments[1:])
    if option is not None:
        for old in ("--name", "--resume"):
            while old in words:
                del words[words.index(old) : words.index(old) + 2]
            words = [word for word in words if not word.startswith(f"{old}=")]
        words += [option, directory.partition("?")[0].rsplit("/", 1)[-1]]
    return shlex.join([*program_words(arguments[0]), *words])
