"""A run that goes on with another run's weights, as population based training asks for.

Owns the copy of one run's checkpoints into the folder of another. Weights, state of the optimiser,
of the policy and of batch normalisation, and progress are copied to the bit; the order of the samples
follows from seed and epoch. No Ray.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

from repmtl_ray.config import Experiment, ExperimentError, differences, replace, to_dict
from repmtl_ray.runs.checkpoint import EXPERIMENT_FILE, STATE_FILE, read_experiment
from repmtl_ray.runs.checkpoint_manager import (
    CheckpointManager,
    Contents,
    describe,
    read_contents,
    read_marker,
)


def take_over(
    source: str, folder: str, experiment: Experiment, *, epoch: int, may_change: Collection[str]
) -> None:
    """Replaces a run's checkpoints by another run's newest one, and by that of its best epoch.

    Repeated after an interruption, it does what is left to do. The other run must not go on before.

    Args:
        source: folder of the run whose weights are taken.
        folder: of the run that takes them. Without this run's own checkpoints, because the best
            epoch's would be taken for one of the history that it has now.
        experiment: what `folder`'s run trains from now on.
        epoch: that both have ended last.
        may_change: dotted paths in which the two experiments may differ.

    Raises:
        ExperimentError: they differ in another value.
        ValueError: the other run has no checkpoint of this epoch.
        StorageError: the storage refused it.
    """
    given = CheckpointManager(source)
    newest = given.latest()
    marker = None if newest is None else read_marker(newest)
    if newest is None or marker is None or (marker.epochs_done, marker.step_in_epoch) != (epoch, 0):
        raise ValueError(f"{source} has no checkpoint of the end of epoch {epoch} to take over.")
    stored = read_experiment(newest)
    wanted = replace(stored, {path: value_at(experiment, path) for path in may_change})
    if wanted != experiment:
        raise ExperimentError(
            f"checkpoint {newest} cannot be taken over: {differences(wanted, experiment)}; only "
            f"{', '.join(sorted(may_change))} may differ."
        )
    best, contents = given.best(), read_contents(newest)
    taking = CheckpointManager(folder)
    taking.remove_all()
    if best is not None and best != newest:
        taking.write(read_contents(best))
    files = {**contents.files, EXPERIMENT_FILE: _as_file(experiment)}
    described = dataclasses.replace(contents.marker, files=describe(files))
    taking.write(Contents(files=files, marker=described))


def state_digest(folder: str) -> tuple[int, str]:
    """How many epochs a run has ended, and the digest of its newest state; (0, "") without any."""
    newest = CheckpointManager(folder).latest()
    if newest is None:
        return 0, ""
    marker = read_marker(newest)
    return marker.epochs_done, marker.files[STATE_FILE][1]


def value_at(experiment: Experiment, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = to_dict(experiment)
    for name in path.split("."):
        value = value[name]
    return value


def _as_file(experiment: Experiment) -> bytes:
    return (json.dumps(to_dict(experiment), indent=2) + "\n").encode()
