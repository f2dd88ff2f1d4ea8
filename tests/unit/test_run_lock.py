"""Locks of folders: one owner at a time, taken over when it is dead, on a disk and in a bucket."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray import run_lock, storage
from repmtl_ray.run_lock import Interrupted, LockedError, Owner, hold
from tests.helpers.s3 import KEYS, serving


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.1)
    monkeypatch.setattr(run_lock, "POLL_S", 0.05)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        yield server.uri("runs")


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("bucket"), tmp_path.name)


def lock_of(folder: str) -> str:
    return storage.join(folder, run_lock.LOCK_FILE)


def status_of(folder: str) -> str:
    return json.loads(storage.read(storage.join(folder, run_lock.STATUS_FILE)))["status"]


def owner(**changes: object) -> Owner:
    """A process of this machine that has ended."""
    now = time.time()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    known = Owner(
        kind="run",
        host="elsewhere",
        machine=run_lock._machine(),
        pid=ended.pid,
        process_start="1",
        token="t",
        since=now,
        heartbeat=now,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def write(folder: str, lock: Owner) -> None:
    storage.write(lock_of(folder), json.dumps(asdict(lock)).encode())


def test_a_second_owner_is_refused_and_told_who_holds_it_since_when_and_what_to_do(
    folder: str,
) -> None:
    with hold(folder, "search"):
        assert status_of(folder) == "running"
        expected = rf"in use by a search of process {os.getpid()} on .* since 20.*sign of life.*give another name"
        with pytest.raises(LockedError, match=expected), hold(folder, "run"):
            pass
    assert status_of(folder) == "finished"
    with hold(folder, "run"):
        pass


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(folder: str) -> None:
    write(folder, owner())
    with hold(folder, "run"):
        pass
    write(folder, owner(pid=os.getpid(), process_start=run_lock._process_start(os.getpid())))
    with hold(folder, "run"):  # of this very process, which has lost track of it
        pass
    write(folder, owner(pid=os.getppid(), process_start="an earlier process of the same id"))
    with hold(folder, "run"):
        pass
    assert not storage.exists(lock_of(folder))


def test_a_process_that_lives_keeps_its_lock(folder: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write(folder, owner(pid=other.pid, process_start=run_lock._process_start(other.pid)))
        with pytest.raises(LockedError, match=f"kill {other.pid}"), hold(folder, "run"):
            pass
        other.kill()


def test_the_lock_of_another_machine_is_taken_over_when_its_heartbeat_is_old(folder: str) -> None:
    elsewhere = owner(machine="another", heartbeat=time.time() - run_lock.STALE_S + 20)
    write(folder, elsewhere)
    with pytest.raises(LockedError, match=r"taken over in (1\d|20) s"), hold(folder, "run"):
        pass
    write(folder, replace(elsewhere, heartbeat=time.time() - run_lock.STALE_S - 1))
    with hold(folder, "run"):
        pass


def test_a_lock_that_was_cut_short_is_taken_over(folder: str) -> None:
    storage.write(lock_of(folder), b'{"kind": "ru')
    with hold(folder, "run"):
        pass


def test_of_two_that_start_at_once_one_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SETTLE_S", 1.5)  # six threads write to the bucket's server
    results: list[str] = []
    ready = threading.Barrier(6)

    def work() -> None:
        ready.wait()
        try:
            with hold(folder, "run"):
                results.append("held")
                time.sleep(1.0)
        except LockedError:
            results.append("refused")

    for dead in (False, True):
        results.clear()
        if dead:
            write(folder, owner())
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["held", *["refused"] * 5]


def test_a_disk_whose_folders_cannot_be_locked_still_has_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS, which refuses flock on what was not opened for writing."""

    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refused)
    with (
        hold(str(tmp_path), "run"),
        pytest.raises(LockedError, match="is in use by a run"),
        hold(str(tmp_path), "run"),
    ):
        pass


def test_who_waits_gets_the_lock_when_its_owner_ends(folder: str) -> None:
    order: list[str] = []

    def first() -> None:
        with hold(folder, "run"):
            started.set()
            time.sleep(0.3)
            order.append("first")

    started = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    with hold(folder, "run", wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_errors_and_interruptions_release_the_lock_and_leave_their_status(folder: str) -> None:
    with pytest.raises(ZeroDivisionError), hold(folder, "run"):
        raise ZeroDivisionError
    assert status_of(folder) == "failed"
    with pytest.raises(Interrupted) as info, hold(folder, "run"):
        raise KeyboardInterrupt
    assert (info.value.kind, info.value.directory) == ("run", folder)
    assert status_of(folder) == "interrupted"
    assert not storage.exists(lock_of(folder))


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_owner_gives_signs_of_life_and_stops_when_its_lock_was_taken(
    folder: str, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    """Also a process that a shell started in the background, which ignores SIGINT."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.2)
    before = signal.signal(signal.SIGINT, handler)

    def heartbeat() -> float:
        owner = run_lock._read(lock_of(folder))  # again, if its owner is writing it at this moment
        assert owner is not None
        return owner.heartbeat

    def work() -> None:
        with hold(folder, "run"):
            first = heartbeat()
            while heartbeat() == first:
                time.sleep(0.05)
            while True:  # until the owner notices
                write(folder, taken)
                time.sleep(1.0)

    taken = owner(machine="another")
    try:
        with pytest.raises(LockedError, match="another process has taken over"):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads(storage.read(lock_of(folder)))["machine"] == "another"


def test_a_process_that_is_to_be_ended_leaves_no_lock(folder: str) -> None:
    with hold(folder, "search"):
        assert run_lock.abandon() == [("search", folder)]
        assert not storage.exists(lock_of(folder))
        assert status_of(folder) == "interrupted"
