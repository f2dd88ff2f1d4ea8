"""One process at a time for every run, search, benchmark and preparation.

Owns the lock file of a folder, who holds it, and the status that the folder's last process left.
Imports neither torch nor Ray.

On a disk a lock is made by exclusive creation, by one process of a machine at a time (flock on the
folder). Where the file system has no flock, as NFS for folders, two processes that take over a dead
owner's lock at once may both go on, as below. A bucket has no exclusive creation: a process writes its
lock, waits `SETTLE_S`, and reads it back. Two processes that are slower than that between their
reading and their writing may both go on; the one whose lock was overwritten finds it at its next
heartbeat and stops. A lock outlives a killed process. It is taken over at once if its process is
known to be dead (same machine: process id and start time), and otherwise when its last heartbeat is
older than `STALE_S`; the clocks of machines must agree to a minute.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import platform
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs

from repmtl_ray import storage

logger = logging.getLogger(__name__)

LOCK_FILE = "lock.json"
STATUS_FILE = "status.json"
HEARTBEAT_S = 20.0
"""Between two signs of life of a lock's owner."""
STALE_S = 180.0
"""Age of the last heartbeat at which an owner on another machine counts as dead."""
SETTLE_S = 2.0
"""Between writing a lock to a bucket and reading it back."""
POLL_S = 1.0

Status = Literal["running", "finished", "failed", "interrupted"]
_NO_FLOCK = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that cannot lock a folder: NFS the first, others the rest."""
_held: dict[str, tuple[str, Owner]] = {}
"""By token, the folder and the owner of every lock that this process holds, the outermost first."""
_acquiring: set[str] = set()
"""Tokens of the locks that threads of this process are about to hold; their owners are alive too."""


class LockedError(ValueError):
    """A folder that another process uses."""


class Interrupted(KeyboardInterrupt):  # as its base class
    """Ctrl-C or another signal ended a run or a study that can be continued.

    Args:
        kind: "run", "search", "benchmark" or "preparation".
        directory: its folder or URI.
    """

    def __init__(self, kind: str, directory: str) -> None:
        super().__init__(f"{kind} {directory} was interrupted")
        self.kind = kind
        self.directory = directory


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock.

    Args:
        kind: what it does: "run", "search", "benchmark" or "preparation".
        host: name of its machine, for people.
        machine: the same with the boot and the process namespace, which process ids belong to.
        pid: its process id.
        process_start: when that process started, as the system says; ids are used again.
        token: random, of this lock.
        since: when it took the lock, in seconds since 1970.
        heartbeat: its last sign of life, likewise.
    """

    kind: str
    host: str
    machine: str
    pid: int
    process_start: str
    token: str
    since: float
    heartbeat: float


@contextlib.contextmanager
def hold(directory: str, kind: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, and notes there how it went (`STATUS_FILE`).

    Args:
        directory: folder or URI; made if it does not exist.
        kind: "run", "search", "benchmark" or "preparation".
        wait: for a living owner to end, instead of refusing.

    Raises:
        LockedError: another process that lives holds it; or took it over meanwhile.
        Interrupted: in place of a KeyboardInterrupt inside the block.
    """
    owner = _acquire(directory, kind, wait)
    released, taken = threading.Event(), threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    heartbeat = threading.Thread(
        target=_beat, args=(directory, owner, released, taken, is_main), daemon=True
    )
    heartbeat.start()
    status: Status = "failed"
    write_status(directory, owner, "running")
    try:
        yield
        status = "finished"
    except KeyboardInterrupt as interrupt:
        if taken.is_set():
            raise LockedError(_taken(directory)) from interrupt
        status = "interrupted"
        if isinstance(interrupt, Interrupted):
            raise
        raise Interrupted(kind, directory) from interrupt
    finally:
        released.set()
        _held.pop(owner.token, None)
        if not taken.is_set():
            with contextlib.suppress(
                ValueError, OSError
            ):  # the block's own error is the one to show
                write_status(directory, owner, status)
                _release(directory, owner)
    if taken.is_set():
        raise LockedError(_taken(directory))


def abandon() -> list[tuple[str, str]]:
    """Releases all locks of this process as interrupted; for a process that is about to be ended.

    Returns:
        Kind and directory of what was abandoned, the outermost first.
    """
    entries = list(_held.values())
    for directory, owner in entries:
        with contextlib.suppress(ValueError, OSError):
            write_status(directory, owner, "interrupted")
            _release(directory, owner)
    return [(owner.kind, directory) for directory, owner in entries]


def write_status(directory: str, owner: Owner, status: Status) -> None:
    """Notes how the last process of a folder went."""
    values: dict[str, Any] = {
        "status": status,
        "kind": owner.kind,
        "host": owner.host,
        "pid": owner.pid,
        "started": _text_of(owner.since),
    }
    if status != "running":
        values["ended"] = _text_of(time.time())
    storage.write(_location(directory, STATUS_FILE), (json.dumps(values, indent=1) + "\n").encode())


def _location(directory: str, name: str) -> str:
    return storage.join(directory, name)


def _text_of(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _acquire(directory: str, kind: str, wait: bool) -> Owner:
    said = False
    while True:
        now = time.time()
        owner = Owner(
            kind=kind,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            token=uuid.uuid4().hex,
            since=now,
            heartbeat=now,
        )
        _acquiring.add(owner.token)
        try:
            other = _try(_location(directory, LOCK_FILE), owner)
            if other is None:
                _held[owner.token] = (directory, owner)
                return owner
        finally:
            _acquiring.discard(owner.token)
        if not wait:
            raise LockedError(_refusal(directory, other))
        if not said:
            said = True
            print(f"waiting for process {other.pid} on {other.host}, which uses {directory}")
        time.sleep(POLL_S)


def _try(location: str, owner: Owner) -> Owner | None:
    """Takes a lock; or returns the living owner that has it."""
    with storage.explained(location):
        system, path = storage.open_location(location)
        if not isinstance(system, fs.LocalFileSystem):
            other = _read(location)
            if other is not None and is_alive(other):
                return other
            _write(location, owner)
            time.sleep(SETTLE_S)
            other = _read(location)
            return None if other is None or other.token == owner.token else other
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(Path(path).parent):
            while True:
                with contextlib.suppress(FileExistsError), Path(path).open("x") as file:
                    file.write(json.dumps(asdict(owner)))
                    return None
                other = _read(location)
                if other is not None and is_alive(other):
                    return other
                _remove_dead(Path(path), owner.token, other)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps this machine's other threads and processes out while one looks at a folder's lock and takes
    it: between a look at a dead owner's lock and its removal, another could have taken it over."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        yield
    finally:
        os.close(descriptor)  # which gives the folder free


def _remove_dead(path: Path, token: str, dead: Owner | None) -> None:
    """Moves a dead owner's lock away. What was moved may be a newer lock, of a process that was
    faster: it is put back."""
    moved = path.with_name(f"{path.name}.{token}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(moved)
        removed = _read(str(moved))
        if removed is not None and (dead is None or removed.token != dead.token):
            with contextlib.suppress(FileExistsError):
                os.link(moved, path)
        moved.unlink()


def _read(location: str) -> Owner | None:
    """The owner that a lock names; None if there is none, or it stays unreadable for a second."""
    for _ in range(10):
        try:
            return Owner(**json.loads(storage.read(location)))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            if isinstance(error, storage.StorageError):
                raise
            time.sleep(0.1)  # its owner is writing it
    return None


def _write(location: str, owner: Owner) -> None:
    storage.write(location, json.dumps(asdict(owner)).encode())


def _release(directory: str, owner: Owner) -> None:
    location = _location(directory, LOCK_FILE)
    other = _read(location)
    if other is not None and other.token == owner.token:
        storage.remove(location)


def _beat(
    directory: str,
    owner: Owner,
    released: threading.Event,
    taken: threading.Event,
    is_main: bool,
) -> None:
    location = _location(directory, LOCK_FILE)
    while not released.wait(HEARTBEAT_S):
        try:
            other = _read(location)
            if released.is_set():
                return
            if other is not None and other.token == owner.token:
                _write(location, Owner(**{**asdict(owner), "heartbeat": time.time()}))
                continue
        except (ValueError, OSError) as error:
            logger.warning("the lock of %s cannot be renewed: %s", directory, error)
            continue
        taken.set()
        if is_main:
            _interrupt_main_thread()
        return


def _interrupt_main_thread() -> None:
    """Raises `KeyboardInterrupt` in the main thread, also where a shell that started this process in the
    background made it ignore SIGINT."""
    if callable(signal.getsignal(signal.SIGINT)):
        _thread.interrupt_main()
        return
    identifier = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(identifier, ctypes.py_object(KeyboardInterrupt))


def is_alive(owner: Owner) -> bool:
    """Whether the process that holds a lock still lives, as far as can be known from here."""
    if owner.machine != _machine():
        return time.time() - owner.heartbeat <= STALE_S
    if owner.pid == os.getpid():
        return owner.token in _acquiring or owner.token in _held
    return bool(owner.process_start) and _process_start(owner.pid) == owner.process_start


def _machine() -> str:
    """The host, its boot and the namespace of its process ids: where an id means the same process."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process_start(pid: int) -> str:
    """When a process started; empty if there is none, or if it has ended and waits for its parent."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in ("Z", "X") else fields[19]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _refusal(directory: str, owner: Owner) -> str:
    age = max(0.0, time.time() - owner.heartbeat)
    if owner.machine == _machine():
        advice = f"Wait until it ends, stop it (kill {owner.pid}), or give another name."
    else:
        advice = (
            "Wait until it ends, stop it there, or give another name. If it is dead, its lock can be taken over in "
            f"{max(0.0, STALE_S - age):.0f} s."
        )
    return (
        f"{directory} is in use by a {owner.kind} of process {owner.pid} on {owner.host} since {_text_of(owner.since)} "
        f"(last sign of life {age:.0f} s ago). {advice}"
    )


def _taken(directory: str) -> str:
    return (
        f"{directory}: another process has taken over its lock, because this one gave no sign of life for "
        f"{STALE_S:.0f} s (a machine that slept?). This process stops; the other one continues the work."
    )
