"""Small real runs on rendered street scenes, in this process and without Ray.

Needs the fixture `scenes_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.sources import open_streams
from repmtl_ray.runs import loop
from repmtl_ray.runs.checkpoint import Parts, Snapshot

Watch = Callable[[dict[str, float]], None]


def small_experiment(**overrides: Any) -> Experiment:
    """Two steps an epoch on eight scenes; `overrides` by path, with "__" for the dots."""
    experiment = Experiment(
        data=DataConfig(
            name="cityscapes", height=32, width=64, num_train=8, num_val=4, augment=True
        ),
        model=ModelConfig(encoder="test_efficientnet", head="linear"),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        epochs=2,
        batch_size=4,
    )
    return replace(experiment, {path.replace("__", "."): v for path, v in overrides.items()})


def float64_experiment() -> Experiment:
    """Four steps an epoch on rendered scenes; in float64, so that worker counts can be compared."""
    return Experiment(
        data=DataConfig(
            name="cityscapes", height=32, width=64, num_train=16, num_val=6, augment=True
        ),
        model=ModelConfig(encoder="test_efficientnet", head="linear", dropout=0.0),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.01),
        epochs=3,
        batch_size=4,
        precision="float64",
    )


@dataclass
class SaveAt:
    """Writes checkpoints after some steps.

    Args:
        places: by number of steps done, where.
        saved: gets those that were written.
    """

    places: Mapping[int, Path]
    saved: dict[int, Path] = field(default_factory=dict)
    folder: str = ""

    def after_step(self, snapshot: Snapshot) -> None:
        step = snapshot.progress.global_step
        if step in self.places:
            snapshot.save(self.places[step])
            self.saved[step] = self.places[step]

    def after_epoch(self, snapshot: Snapshot) -> None:
        pass


@dataclass
class Run:
    """What a run left behind.

    Args:
        parts: at the end.
        reported: the metrics of every epoch that this run trained itself.
        history: the metrics of all epochs.
        checkpoints: by number of epochs done; those asked for.
        inside: by number of steps done; those asked for.
    """

    parts: Parts
    history: list[dict[str, float]]
    reported: list[dict[str, float]] = field(default_factory=list)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    inside: dict[int, Path] = field(default_factory=dict)


def split(experiment: Experiment, name: str) -> loop.Split:
    streams = open_streams(experiment.data, name)
    return loop.Split(streams=streams, rows={stream.name: LocalRows(stream) for stream in streams})


def run(
    experiment: Experiment,
    *,
    checkpoints: Path | None = None,
    resume_from: Path | None = None,
    watch: Watch | None = None,
    save_at: Sequence[int] = (),
) -> Run:
    """Trains; keeps every epoch's checkpoint below `checkpoints`, and those after the steps
    `save_at`."""
    reported: list[dict[str, float]] = []
    kept: dict[int, Path] = {}
    inside: dict[int, Path] = {}

    def report(metrics: dict[str, float], snapshot: Snapshot) -> None:
        reported.append(metrics)
        if watch is not None:
            watch(metrics)
        if checkpoints is not None:
            kept[int(metrics["epoch"])] = checkpoints / f"after-{metrics['epoch']}"
            snapshot.save(kept[int(metrics["epoch"])])

    parts, progress = loop.run(
        experiment,
        train=split(experiment, "train"),
        evaluation=split(experiment, experiment.data.eval_split),
        report=report,
        checkpoints=SaveAt({step: Path(f"{checkpoints}/step-{step}") for step in save_at}, inside),
        resume_from=resume_from,
    )
    return Run(
        parts=parts, history=progress.history, reported=reported, checkpoints=kept, inside=inside
    )


def state_of(parts: Parts) -> dict[str, Any]:
    """All that a run remembers."""
    return {
        "model": dict(parts.model.state_dict()),
        "optimizer": parts.optimizer.state_dict()["state"],
        "groups": parts.optimizer.state_dict()["param_groups"],
        "scheduler": parts.scheduler.state_dict(),
        "policy": parts.policy.state_dict(),
    }
