"""The runs of a study, and the one record that each of them leaves.

Owns what a record holds and where it lies; what its keys mean in tables is in `report/records.py`. That
of a population has its "schedule" too (`pbt.py`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import repmtl_ray
from repmtl_ray import code_version, protocols, storage
from repmtl_ray.config import Experiment, differences, digest, from_dict, replace, to_dict
from repmtl_ray.runs.checkpoint_manager import CheckpointManager, read_marker
from repmtl_ray.runs.worker import CachedData

METRIC = "delta_p_task"

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study.

    Args:
        name: of its folder and its record; equal experiments of a study have equal names.
        label: as it is printed.
        experiment: what is trained.
        facts: what its record says besides its results.
        changes: what a scheduler has changed of the experiment since the run began, by dotted path.
    """

    name: str
    label: str
    experiment: Experiment
    facts: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> Experiment:
        """What is trained from now on."""
        return replace(self.experiment, self.changes) if self.changes else self.experiment


def make_record(
    experiment: Experiment,
    facts: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    *,
    checkpoint: str,
    seconds: float = 0.0,
    final: Mapping[str, float] | None = None,
    status: str = "done",
) -> Record:
    """What is kept of a run; `report/records.py` says what the keys mean."""
    metrics, epochs = dict(history[-1]), [len(history)]
    if experiment.protocol in protocols.NAMES and status == "done":
        selection = protocols.select(experiment.protocol, history)
        metrics, epochs = dict(selection.metrics), list(selection.epochs)
    return {
        **facts,
        "status": status,
        "seed": experiment.seed,
        "metrics": metrics if final is None else {name: final[name] for name in metrics},
        "selection_metrics": metrics,
        "epochs": epochs,
        "history": [dict(row) for row in history],
        "experiment": to_dict(experiment),
        "digest": digest(replace(experiment, {"seed": 0})),
        "checkpoint": checkpoint,
        "seconds": seconds,
    }


def record_location(folder: str, name: str) -> str:
    return f"{folder}/records/{name}.json"


def write_record(folder: str, name: str, record: Record) -> None:
    storage.write(record_location(folder, name), (json.dumps(record, indent=1) + "\n").encode())


def read_record(folder: str, run: Run) -> Record | None:
    """The record of a run; None if it has none.

    Raises:
        ValueError: the record is of another configuration, from before a method was changed.
    """
    location = record_location(folder, run.name)
    try:
        record: Record = json.loads(storage.read(location))
    except FileNotFoundError:
        return None
    stored = from_dict(Experiment, record["experiment"])
    if stored != run.experiment:
        raise ValueError(
            f"{location} is of another configuration: {differences(stored, run.experiment)}. "
            "Give another name, or remove the record."
        )
    return record


def write_failure(folder: str, run: Run, reason: str) -> None:
    """Writes the reason why a run has no record. A record that the run gets later takes its place."""
    values = {"label": run.label, "experiment": to_dict(run.experiment), "reason": reason}
    storage.write(f"{folder}/failures/{run.name}.json", (json.dumps(values) + "\n").encode())


def other_code(record: Record) -> str:
    """The note on a record that other sources of this package made; empty if these made it."""
    keys = code_version.current().keys() & record.keys()
    difference = code_version.difference({key: record[key] for key in keys})
    return difference and f"made with {difference}; this code may give other numbers"


def shared_facts(
    experiment: Experiment, data: CachedData, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What all records of a study say.

    Args:
        experiment, data: of the study.
        notes: besides those of the data.
    """
    from repmtl_ray.report.records import data_source

    protocol = experiment.protocol
    official = protocol in protocols.NAMES
    final = protocols.final_split(protocol, experiment.data) if official else None
    changes = ""
    if official and experiment.data.name != "custom":  # no protocol says how these are trained
        changes = differences(protocols.settings(protocol, experiment.data), experiment)
    return {
        "dataset": experiment.data.name,
        "source": data_source(experiment.data),
        "fingerprint": data.fingerprint,
        "protocol": protocol,
        "changes": changes,
        "reported_split": experiment.data.eval_split if data.final is None else final,
        "notes": [*data.notes, *notes],
        "commit": commit_of_code(),
        **code_version.current(),
    }


def write_stopped_record(
    folder: str, run: Run, facts: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Writes the record of a run that was stopped early, up to its last epoch; none without one."""
    newest = CheckpointManager(f"{folder}/runs/{run.name}").latest()
    history = [] if newest is None else read_marker(newest).history[: int(metrics.get("epoch", 0))]
    if not history:
        return
    record = make_record(
        run.experiment,
        {**facts, **run.facts},
        history,
        checkpoint=str(metrics.get("checkpoint_path", "")),
        status="stopped",
    )
    write_record(folder, run.name, record)


def commit_of_code() -> str:
    """The git commit of this package, with a + where files are changed; its version outside git."""
    folder = Path(repmtl_ray.__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.CalledProcessError):
        return f"version {repmtl_ray.__version__}"
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
