"""The folder of a run, a search or a benchmark: its name, and what it belongs to.

Owns the files that say whose a folder is. Who works in it now is for `run_lock.py`. Imports neither
torch nor Ray.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from repmtl_ray import storage
from repmtl_ray.config import Experiment, differences, digest, from_dict, to_dict

EXPERIMENT_FILE = "experiment.json"
FINGERPRINT_FILE = "data_fingerprint.txt"


def checked_place(
    location: str | Path | None, name: str | None, kind: str, experiment: Experiment
) -> tuple[str, str]:
    """The storage and the name of a run or a study, found usable before Ray starts.

    Args:
        location, name: storage and name as the user gave them.
        kind: begins a new name.
        experiment: its digest ends a new name.

    Raises:
        ValueError: a name that is no folder's, or a storage that cannot be written.
    """
    root = storage.absolute(location)
    name = fresh_name(kind, experiment) if name is None else storage.check_name(name)
    storage.check_writable(root)
    return root, name


def check_resume(kind: str, directory: str, resume: bool) -> None:
    """A search or a benchmark is new, or there is one to continue.

    Raises:
        ValueError: it is not.
    """
    exists_already = storage.exists(f"{directory}/{EXPERIMENT_FILE}")
    if resume and not exists_already:
        raise ValueError(
            f"resume: there is no {kind} at {directory}; check its name and storage, or start it without resume."
        )
    if exists_already and not resume:
        raise ValueError(
            f"a {kind} at {directory} exists already; give another name, or resume to continue it."
        )


def claim(directory: str, experiment: Experiment, fingerprint: str | None = None) -> None:
    """Notes in the folder of a run or a search whose it is.

    Args:
        directory: of the run or search.
        experiment: that owns it.
        fingerprint: of custom data, which the experiment does not name.

    Raises:
        ValueError: it belongs to another experiment, or to other custom data.
    """
    if fingerprint is not None:
        note = f"{directory}/{FINGERPRINT_FILE}"
        if not storage.exists(note):
            storage.write(note, fingerprint.encode())
        elif (known := storage.read(note).decode()) != fingerprint:
            raise ValueError(
                f"{directory} was trained on other data: theirs has the fingerprint {known}, this "
                f"{fingerprint}. Continue it with the same data, or give another name."
            )
    note = f"{directory}/{EXPERIMENT_FILE}"
    if not storage.exists(note):
        storage.write(note, (json.dumps(to_dict(experiment), indent=2) + "\n").encode())
        return
    stored = from_dict(Experiment, json.loads(storage.read(note)))
    if stored != experiment:
        raise ValueError(
            f"{directory} belongs to another experiment: {differences(stored, experiment)}. "
            "Continue it with the same configuration, or give another name."
        )


def fresh_name(kind: str, experiment: Experiment) -> str:
    """A run name that no earlier run has."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{digest(experiment)}"
