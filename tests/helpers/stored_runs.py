"""Checkpoints of a run that hold no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repmtl_ray.runs import checkpoint_manager
from repmtl_ray.runs.checkpoint import Progress
from repmtl_ray.runs.checkpoint_manager import Contents, Marker, describe

STATE = b"the state of a run" * 20


def small_contents(
    epochs_done: Any, step_in_epoch: int = 0, errors: Any = (), step: Any = None
) -> Contents:
    """What `CheckpointManager.write` is given, for a small state; `errors`, of every epoch done."""
    files = {"state.pt": STATE, "experiment.json": b"{}"}
    marker = Marker(
        files=describe(files),
        history=[{"depth/abs_error": error} for error in errors or [1.0] * epochs_done],
        epochs_done=epochs_done,
        step_in_epoch=step_in_epoch,
        global_step=4 * epochs_done + step_in_epoch if step is None else step,
    )
    return Contents(files=files, marker=marker)


@dataclass
class SmallSnapshot:
    """Stands in for `checkpoint.Snapshot`, at a step or after an epoch."""

    stored: Contents

    @property
    def progress(self) -> Progress:
        return Progress(global_step=self.stored.marker.global_step)

    def contents(self) -> Contents:
        return self.stored


def places(folder: Path) -> list[Any]:
    """(epochs done, step in epoch) of what lies there."""
    found = [checkpoint_manager.NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted((int(match[1]), int(match[2])) for match in found if match)
