"""The checkpoints of one run as they lie in its storage: which are whole, when one is due, which
stay.

Owns their names, the mark that makes a folder of files a checkpoint, and retention. What the files
hold is for `checkpoint.py`. Imports neither torch nor Ray.

A checkpoint is a folder. Its last file, `complete.json`, has the length and SHA-256 of every other:
a folder without it, or one that it does not describe, is torn and never loaded. Folders are never
written twice: their names end in random digits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from repmtl_ray import storage
from repmtl_ray.conversion import check, check_types, from_dict, to_dict
from repmtl_ray.protocols import best_epoch

logger = logging.getLogger(__name__)

MARKER_FILE = "complete.json"
FINAL_FILE = "final.json"
"""Beside the checkpoints: the official split, read once with the best epoch's weights (final.py)."""
FORMAT = 2
NAME = re.compile(r"checkpoint_(\d{6})_(\d{8})_[0-9a-f]{8}")


class TornCheckpointError(ValueError):
    """A folder that is no whole checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved besides after every epoch, and what stays; no result depends on it.

    Args:
        every_steps: also inside an epoch, after so many optimiser steps; None does not.
        every_minutes: also inside an epoch, once so many minutes have passed since the last one;
            None does not.
        keep: the newest so many stay, and the best epoch's.
    """

    every_steps: int | None = None
    every_minutes: float | None = 15.0
    keep: int = 2

    def __post_init__(self) -> None:
        check_types(self, "checkpoints")
        steps, minutes = self.every_steps, self.every_minutes
        if steps is not None and steps < 1:
            raise ValueError(f"checkpoints: every_steps is {steps}; expected at least 1, or None.")
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise ValueError(f"checkpoints: every_minutes is {minutes}; expected above 0, or None.")
        if self.keep < 2:
            raise ValueError(
                f"checkpoints: keep is {self.keep}; expected at least 2: where the newest is torn, a run goes on from the "
                "one before."
            )


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What the last file of a checkpoint says.

    Args:
        files: length in bytes and SHA-256 (hexadecimal) of every other file.
        epochs_done, step_in_epoch, global_step: where the run stood.
        history: the metrics of every epoch done.
        data: fingerprint of the samples; "" if none was given.
    """

    files: Mapping[str, tuple[int, str]]
    epochs_done: int
    step_in_epoch: int
    global_step: int
    history: list[dict[str, int | float]]
    data: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs_done", "step_in_epoch", "global_step"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


def marker_text(marker: Marker) -> str:
    return json.dumps({"format": FORMAT, **to_dict(marker)}, indent=1) + "\n"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint before it is written.

    Args:
        files: by name, all but the marker.
        marker: what describes them.
    """

    files: Mapping[str, bytes]
    marker: Marker


def write_contents(location: str, contents: Contents) -> None:
    """Writes a checkpoint to a new folder or URI; it is none before its marker is there.

    Raises:
        StorageError: the storage refused it.
    """
    for name, content in contents.files.items():
        storage.write(f"{location}/{name}", content)
    storage.write(f"{location}/{MARKER_FILE}", marker_text(contents.marker).encode())


def describe(files: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    """Length and digest of each."""
    return {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


def read_marker(location: str) -> Marker:
    """What a checkpoint says of itself.

    Raises:
        TornCheckpointError: no marker, or one that is damaged.
        ValueError: the marker of another format.
    """
    path = f"{location}/{MARKER_FILE}"
    try:
        values = json.loads(storage.read(path).decode())
    except FileNotFoundError:
        raise TornCheckpointError(
            f"checkpoint {location} has no {MARKER_FILE}: it is not a checkpoint, or was never completed."
        ) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, storage.StorageError):
            raise
        raise TornCheckpointError(f"checkpoint {path} is damaged: {error}.") from error
    if not isinstance(values, dict) or "format" not in values:
        raise TornCheckpointError(f"checkpoint {path} is not the marker of a checkpoint.")
    if values.pop("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has another format; this version reads format {FORMAT}."
        )
    try:
        return from_dict(Marker, values)
    except ValueError as error:
        raise TornCheckpointError(
            f"checkpoint {path} is damaged: it has not the fields of a marker ({error})."
        ) from error


def read_contents(location: str) -> Contents:
    """A whole checkpoint.

    Raises:
        TornCheckpointError: it is none.
    """
    marker = read_marker(location)
    files = {name: read_file(location, name, marker) for name in marker.files}
    return Contents(files=files, marker=marker)


def read_file(location: str, name: str, marker: Marker) -> bytes:
    """One file of a checkpoint, as long and with the digest that its marker says.

    Raises:
        TornCheckpointError: it is not.
    """
    path = f"{location}/{name}"
    if name not in marker.files:
        raise TornCheckpointError(f"checkpoint {location} has no {name}; it is not a checkpoint.")
    size, digest = marker.files[name]
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise TornCheckpointError(f"checkpoint {location} has no {name}; it is torn.") from None
    if len(data) != size:
        raise TornCheckpointError(
            f"checkpoint {path} is torn: {len(data)} bytes of {size}. Take the one before it."
        )
    if hashlib.sha256(data).hexdigest() != digest:
        raise TornCheckpointError(
            f"checkpoint {path} is damaged: its content is not what was written. Take the one before it."
        )
    return data


def read_final(folder: str) -> dict[str, float] | None:
    """The final metrics of a run that has been evaluated on its official split; None if not."""
    try:
        values = json.loads(storage.read(f"{folder}/{FINAL_FILE}").decode())
    except FileNotFoundError:
        return None
    return {str(name): _number(value) for name, value in values.items()}


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"a metric is {value!r}")
    return value


class CheckpointManager:
    """Writes one run's checkpoints and knows which there are; one in the run's first worker.

    Args:
        folder: of the run, path or URI.
        settings: when and how many.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        folder: str,
        settings: CheckpointConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.settings = settings or CheckpointConfig()
        self._clock = clock
        self._last_time = clock()
        self._last_step: int | None = None
        self._markers: dict[str, Marker] = {}
        self._torn: set[str] = set()
        self.notes: list[str] = []
        """What a user should hear of: torn checkpoints that were passed over."""

    def should_save(self, global_step: int) -> bool:
        """Whether to save inside the epoch, after so many steps of the run."""
        if self._last_step is None:
            self._last_step = global_step - 1
        steps, minutes = self.settings.every_steps, self.settings.every_minutes
        by_steps = steps is not None and global_step - self._last_step >= steps
        return by_steps or (minutes is not None and self._clock() - self._last_time >= 60 * minutes)

    def write(self, contents: Contents) -> str:
        """Stores one more checkpoint, then removes those that need not stay.

        Returns:
            Its location.

        Raises:
            StorageError: it could not be stored; those before are as they were.
        """
        marker = contents.marker
        name = (
            f"checkpoint_{marker.epochs_done:06d}_{marker.step_in_epoch:08d}_{uuid.uuid4().hex[:8]}"
        )
        self._last_time, self._last_step = self._clock(), marker.global_step
        write_contents(f"{self.folder}/{name}", contents)
        self._last_time = self._clock()  # a slow storage must not be all that a run does
        self._prune(name)
        return f"{self.folder}/{name}"

    def remove_all(self) -> None:
        """Removes every checkpoint."""
        for name in self._names():
            self._remove(name)

    def latest(self) -> str | None:
        """The newest whole checkpoint, every byte of it compared; None if there is none.

        Torn ones are passed over, with a message that names them and what is taken instead.

        Raises:
            StorageError: the storage cannot be read, which is not the same as torn.
            ValueError: a checkpoint of another format.
        """
        torn: list[str] = []
        found = None
        for name in self._names():
            location = f"{self.folder}/{name}"
            try:
                marker = read_marker(location)
                for file in marker.files:
                    read_file(location, file, marker)
            except TornCheckpointError as error:
                torn.append(str(error))
                self._torn.add(name)
                continue
            self._markers[name], found = marker, location
            self._last_step = marker.global_step
            break
        for message in torn:
            taken = f"going on from {found}" if found else "there is none before it: starting anew"
            self.notes.append(f"{message} It is passed over; {taken}.")
            logger.warning(self.notes[-1])
        return found

    def best(self) -> str | None:
        """The best epoch's checkpoint (`protocols.best_epoch`); None before the first epoch's end.

        It is among those that stayed: a later epoch can take its place, and not change how the
        earlier ones compare.
        """
        known = self._known()
        history = known[max(known)].history if known else []
        if not history:
            return None
        best = best_epoch(history)
        ends = [
            name
            for name, marker in known.items()
            if marker.epochs_done == best and marker.step_in_epoch == 0
        ]
        return f"{self.folder}/{max(ends)}" if ends else None

    def _names(self) -> list[str]:
        """Newest first."""
        found = storage.list_names(self.folder)
        return sorted((name for name in found if NAME.fullmatch(name)), reverse=True)

    def _known(self) -> dict[str, Marker]:
        """The markers of all that are complete by their own word."""
        for name in self._names():
            if name not in self._markers and name not in self._torn:
                try:
                    self._markers[name] = read_marker(f"{self.folder}/{name}")
                except TornCheckpointError:
                    continue
        return self._markers

    def _prune(self, newest: str) -> None:
        """Removes what is older than the newest and need not stay; the marker first, so that half a
        removal leaves no half a checkpoint."""
        names = self._names()
        self._markers = {name: self._markers[name] for name in names if name in self._markers}
        whole = self._known()
        best = self.best()
        stay = {name for name in names if name in whole}
        stay = set(sorted(stay, reverse=True)[: self.settings.keep])
        for name in names:
            newer = name >= newest and name not in self._torn
            if name in stay or newer or f"{self.folder}/{name}" == best:
                continue
            self._remove(name)

    def _remove(self, name: str) -> None:
        storage.remove(f"{self.folder}/{name}/{MARKER_FILE}")
        storage.remove(f"{self.folder}/{name}")
        self._markers.pop(name, None)
