"""The folder of a run, a search or a benchmark: its name, and what it belongs to.

Owns the files that say whose a folder is. Who works in it now is for `run_lock.py`. Imports neither
torch nor Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repmtl_ray import code_version, storage
from repmtl_ray.config import Experiment, differences, digest, from_dict, to_dict
from repmtl_ray.conversion import check
from repmtl_ray.data.description import DataDescription, data_differences

EXPERIMENT_FILE = "experiment.json"
DATA_FILE = "data.json"
CODE_FILE = "code.json"
STUDY_FILE = "study.json"


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
    is_place = location is None or isinstance(location, str | Path)
    check(is_place, "storage", location, "a folder, a URI or None")
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


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """What a run's result depends on in data of the user's own, which no configuration names.

    Args:
        description: of all their tasks, their image size and normalisation.
        fingerprint: of the samples' content.
    """

    description: DataDescription
    fingerprint: str


def check_owner(directory: str, experiment: Experiment) -> None:
    """Whether a folder is free or belongs to this experiment; writes nothing.

    Raises:
        ValueError: it belongs to another experiment, or another version of this package made it.
    """
    with storage.explained(directory):
        stored = read_values(f"{directory}/{EXPERIMENT_FILE}")
        if stored is None:
            return
        owner = from_dict(Experiment, stored)
        if owner != experiment:
            raise ValueError(
                f"{directory} belongs to another experiment: {differences(owner, experiment)}. "
                "Continue it with the same configuration, or give another name."
            )
        code = read_values(f"{directory}/{CODE_FILE}") or {}
        if code and code.get("version") != code_version.current()["version"]:
            raise ValueError(
                f"{directory} was begun with {code_version.difference(code)}. Continue it with that "
                "version, or give another name: a result of two versions is a result of neither."
            )


def claim(directory: str, experiment: Experiment, data: OwnData | None = None) -> str:
    """Notes in the folder of a run or a study whose it is, or compares with what is noted there.

    Args:
        directory: of the run or study.
        experiment: that owns it.
        data: of the user's own, if the experiment trains on such.

    Returns:
        A note for readers of the result, where other sources of the same version began it; else "".

    Raises:
        ValueError: it belongs to another experiment or to other data (what differs is named), or
            another version of this package made it.
    """
    check_owner(directory, experiment)
    with storage.explained(directory):
        is_new = not storage.exists(f"{directory}/{EXPERIMENT_FILE}")
        if data is not None:
            _claim_data(directory, data, is_new)
        if is_new:
            _write(f"{directory}/{CODE_FILE}", code_version.current())
            _write(f"{directory}/{EXPERIMENT_FILE}", to_dict(experiment))
            return ""
        difference = code_version.difference(read_values(f"{directory}/{CODE_FILE}") or {})
    note = f"{directory} was begun with {difference}; the code may give other numbers."
    if difference:
        print(f"note: {note}", flush=True)
    return note if difference else ""


def _claim_data(directory: str, data: OwnData, is_new: bool) -> None:
    file = f"{directory}/{DATA_FILE}"
    stored = read_values(file)
    if stored is None:
        if not is_new:
            raise ValueError(
                f"{directory} has no {DATA_FILE}: it was begun by a version that did not note the "
                "tasks and the normalisation of its data, so nobody can say whether these are the "
                "same. Give another name."
            )
        _write(file, {"fingerprint": data.fingerprint, **to_dict(data.description)})
        return
    fingerprint = stored.pop("fingerprint", "")
    differs = data_differences(from_dict(DataDescription, stored), data.description)
    if differs:
        raise ValueError(
            f"{directory} was trained with other settings of the data: {differs}. Continue it with "
            "the same ones, or give another name."
        )
    if fingerprint != data.fingerprint:
        raise ValueError(
            f"{directory} was trained on other data: theirs has the fingerprint {fingerprint}, this "
            f"{data.fingerprint}. Continue it with the same samples and the same `CustomData.collate`, or "
            "give another name."
        )


def read_values(location: str) -> dict[str, Any] | None:
    """The plain values of a file; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        values = json.loads(storage.read(location))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{location} is damaged ({error}); remove it, or give another name."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{location} is not of this project; remove it, or give another name.")
    return values


def _write(location: str, values: dict[str, Any]) -> None:
    storage.write(location, (json.dumps(values, indent=2) + "\n").encode())


def claim_study(
    directory: str,
    settings: Mapping[str, Any],
    *,
    methods: Mapping[str, Any] | None = None,
    num_samples: int = 0,
) -> None:
    """Notes in the folder of a study how it was asked for, or compares with what is noted there.

    Args:
        directory: of the study.
        settings: plain values that decide its results; they must stay as they are.
        methods: what each changes; of a resumed study, those that it had must stay as they are.
        num_samples: how many are drawn; of a resumed study, at least as many as before.

    Raises:
        ValueError: a resumed study differs; every difference is named.
    """
    note = f"{directory}/{STUDY_FILE}"
    wanted = json.loads(json.dumps({"settings": settings, "methods": methods or {}}))
    stored = {**wanted, "num_samples": num_samples}
    if storage.exists(note):
        stored = json.loads(storage.read(note))
    old, new = stored["methods"], wanted["methods"]
    common = old.keys() & new.keys()
    difference = differences(
        {**stored["settings"], **{name: old[name] for name in common}},
        {**wanted["settings"], **{name: new[name] for name in common}},
    )
    if num_samples < stored["num_samples"]:
        difference = f"num_samples was {stored['num_samples']}, is {num_samples}, which is fewer"
    if difference:
        raise ValueError(
            f"{directory} was begun with other settings: {difference}. Resume it with the same ones, "
            "or give another name."
        )
    merged = {**wanted, "methods": {**old, **new}, "num_samples": num_samples}
    storage.write(note, (json.dumps(merged, indent=1) + "\n").encode())


def read_study(directory: str) -> tuple[Experiment, dict[str, Any]]:
    """Whose the folder of a study is: its experiment, and what `claim_study` noted.

    Raises:
        ValueError: it is no such folder, or a file of it is damaged.
    """
    with storage.explained(directory):
        owner, study = (
            read_values(f"{directory}/{EXPERIMENT_FILE}"),
            read_values(f"{directory}/{STUDY_FILE}"),
        )
    if owner is None or study is None:
        raise ValueError(
            f"{directory} is not the folder of a search or a benchmark; give the one that the search's "
            "last line names (its storage and its name)."
        )
    return from_dict(Experiment, owner), study


def own_tasks(directory: str) -> list[str]:
    """The tasks of data of the user's own, by name; empty if the study is of other data."""
    stored = read_values(f"{directory}/{DATA_FILE}")
    return [] if stored is None else [task["name"] for task in stored["tasks"]]


def fresh_name(kind: str, experiment: Experiment) -> str:
    """A run name that no earlier run has."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{digest(experiment)}"
