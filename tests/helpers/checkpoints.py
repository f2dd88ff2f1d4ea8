"""Runs without Ray that leave a checkpoint, for tests of what is done with one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.runs import checkpoint_manager, loop


def small_experiment(**changes: Any) -> Experiment:
    values = {
        "data": DataConfig(name="cityscapes", height=32, width=64, num_train=8, num_val=3),
        "model": ModelConfig(encoder="test_efficientnet", head="linear", dropout=0.0),
        "optimizer": OptimizerConfig(learning_rate=3e-3),
        "epochs": 1,
        "batch_size": 4,
    }
    return Experiment(**{**values, **changes})


def split_of(experiment: Experiment, name: str) -> Any:
    streams = open_streams(experiment.data, name)
    return loop.Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams})


def trained(experiment: Experiment, directory: Path) -> tuple[Any, ...]:
    """The last epoch's checkpoint, in `directory`; and the run's parts."""
    parts, progress = loop.run(
        experiment,
        train=split_of(experiment, "train"),
        evaluation=split_of(experiment, experiment.data.eval_split),
        report=lambda metrics, snapshot: snapshot.save(directory),
    )
    return parts, progress


def described_otherwise(saved: Path, other: Path, part: str, **changes: Any) -> Path:
    """A copy whose experiment says something else than the one that was trained, and which is whole
    by its marker."""
    shutil.copytree(saved, other)
    description = json.loads((saved / "experiment.json").read_text())
    description[part].update(changes)
    text = json.dumps(description).encode()
    (other / "experiment.json").write_bytes(text)
    marker = checkpoint_manager.read_marker(str(other))
    files = {**marker.files, **checkpoint_manager.describe({"experiment.json": text})}
    changed = dataclasses.replace(marker, files=files)
    (other / checkpoint_manager.MARKER_FILE).write_text(checkpoint_manager.marker_text(changed))
    return other
