"""Population based training on a real Ray: weights are copied to the bit, processes are kept, and an
interrupted search ends as one that was not."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune as ray_tune

from repmtl_ray import tune
from repmtl_ray.config import Experiment, replace
from repmtl_ray.runs import takeover
from repmtl_ray.runs.callbacks import Callback, RunContext
from repmtl_ray.search import SearchResult
from repmtl_ray.search.pbt import POPULATION_FILE
from repmtl_ray.studies.stored import stored_study

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
RATE, C = "optimizer.learning_rate", "policy.arguments.c"
SPACE = {
    "policy.name": "CAGrad",
    RATE: ray_tune.loguniform(1e-5, 3e-2),
    C: ray_tune.choice([0.1, 0.4, 0.8]),
}


class NoteState(Callback):
    """Notes what a run remembers when it starts or goes on, and at the end of every epoch.

    Args:
        folder: gets a file for each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_run_start(self, context: RunContext) -> None:
        self.context = context
        self._note("start", context.progress.epochs_done)

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        self._note("end", int(metrics["epoch"]))

    def _note(self, moment: str, epoch: int) -> None:
        parts = self.context.parts
        states = [parts.model.state_dict(), parts.optimizer.state_dict()["state"]]
        content = io.BytesIO()
        torch.save([*states, parts.policy.state_dict()], content)
        values = {
            "moment": moment,
            "run": Path(self.context.folder).name,
            "epoch": epoch,
            "state": hashlib.sha256(content.getvalue()).hexdigest(),
            "rate": parts.optimizer.param_groups[0]["lr"],
            "c": getattr(parts.policy, "c", None),
            "process": os.getpid(),
        }
        (self.folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(values))


def searched(experiment: Experiment, storage: Path, name: str, **options: Any) -> SearchResult:
    short = replace(experiment, {"epochs": 3, "precision": "float32"})
    return tune(
        short, SPACE, num_samples=4, scheduler="pbt", storage=str(storage), name=name, **options
    )


def notes_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.iterdir()]


def test_a_population_copies_weights_and_goes_on_after_an_interruption(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    found = searched(experiment, tmp_path, "population", callbacks=[NoteState(folder)])
    assert set(found.table["status"]) == {"done"}
    notes = [note for note in notes_of(folder) if note["c"] is not None]  # not the baselines'
    taken = json.loads((tmp_path / "population" / POPULATION_FILE).read_text())
    assert [entry["epoch"] for entry in taken] == [1, 2]
    for entry in taken:
        (going,) = (
            note
            for note in notes
            if (note["moment"], note["run"], note["epoch"])
            == ("start", entry["run"], entry["epoch"])
        )
        (given,) = (
            note
            for note in notes
            if (note["moment"], note["run"], note["epoch"])
            == ("end", entry["from"], entry["epoch"])
        )
        assert going["state"] == given["state"], "model, optimiser and policy, to the bit"
        assert (going["rate"], going["c"]) == (entry["values"][RATE], entry["values"][C])
    starts = [note for note in notes if note["moment"] == "start"]
    assert len(starts) == 12, "four runs, each paused after epochs 1 and 2"
    assert len({note["process"] for note in notes}) < len(starts), "processes are used again"
    check_schedules(found, tmp_path / "population")
    check_an_interrupted_one(experiment, tmp_path, monkeypatch, found)


def check_schedules(found: SearchResult, directory: Path) -> None:
    """The table says how the weights of each run came about."""
    changed = [schedule for schedule in found.table["schedule"] if len(schedule) > 1]
    assert changed
    for _, row in found.table.iterrows():
        last = row["schedule"][-1]
        assert last["rank"] == row["rank"]
        assert last["values"][RATE] == pytest.approx(row["learning_rate"])
    best = found.table.iloc[0]
    assert (found.best is None) == (len(best["schedule"]) > 1)
    assert any("Population based training" in note for note in found.notes)
    again = stored_study(str(directory))
    assert isinstance(again, SearchResult)
    assert again.table["schedule"].tolist() == found.table["schedule"].tolist()
    assert again.best == found.best


def check_an_interrupted_one(
    experiment: Experiment, storage: Path, monkeypatch: pytest.MonkeyPatch, found: SearchResult
) -> None:
    """Interrupted when a decision was stored and its copy was not made."""
    interrupt(experiment, storage, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray Tune leaves its log files open
        gc.collect()
    with pytest.raises(ValueError, match="population was 4, is 5"):
        tune(
            found.experiment,
            SPACE,
            num_samples=5,
            scheduler="pbt",
            storage=str(storage),
            name="interrupted",
            resume=True,
        )
    again = searched(experiment, storage, "interrupted", resume=True)
    assert again.table["delta_p_task"].tolist() == found.table["delta_p_task"].tolist()
    assert again.table["schedule"].tolist() == found.table["schedule"].tolist()


def interrupt(experiment: Experiment, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(takeover, "take_over", stop)
        with pytest.raises(KeyboardInterrupt):
            searched(experiment, storage, "interrupted")


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
