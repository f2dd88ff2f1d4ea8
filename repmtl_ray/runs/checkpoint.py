"""All that a run must remember to go on as if it had never stopped, as one directory.

Owns what the files hold: `state.pt` (tensors and plain values, read with weights_only=True, so that
a checkpoint made by someone else cannot run code), `experiment.json` and `data.json`. That they are whole is for
`checkpoint_manager.py`, whose marker is written last. Random numbers need no state: every draw is a function of
the seed, the step and the worker (`step.py`, `data/batches.py`), so their position is the `progress`
below. No Ray.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from repmtl_ray.config import (
    OWN_MODEL,
    Experiment,
    ExperimentError,
    differences,
    from_dict,
    to_dict,
)
from repmtl_ray.data.description import DataDescription, data_differences
from repmtl_ray.data.sources import describe_config
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.models.encoders import check_tensors
from repmtl_ray.models.own import ModelFunction, stored_own_model
from repmtl_ray.policies.base import Policy
from repmtl_ray.runs import checkpoint_manager
from repmtl_ray.runs.checkpoint_manager import FORMAT, Contents, Marker
from repmtl_ray.runs.loss_scale import LossScale

STATE_FILE = "state.pt"
EXPERIMENT_FILE = "experiment.json"
DATA_FILE = "data.json"
OWN_SETTINGS = ("initial_lr", "weight_decay", "momentum")
"""Of the optimiser, besides the learning rate: what the experiment says, and not the checkpoint."""
STATE_KEYS = frozenset({"format", "progress", "model", "optimizer", "scheduler", "policy"})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, which is also where its random streams stand.

    Args:
        epochs_done: complete passes, evaluated.
        global_step: optimiser steps done.
        seed: that all draws derive from.
        history: the metrics of every epoch done.
        step_in_epoch: steps done in the epoch after those; 0 right after an evaluation.
        seen: by metric, its value at each of those steps.
        rows_read: what `batches.Loader` has read of rows that are streamed.
    """

    epochs_done: int = 0
    global_step: int = 0
    seed: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    step_in_epoch: int = 0
    seen: dict[str, list[float]] = field(default_factory=dict)
    rows_read: dict[str, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs_done", "global_step", "seed", "step_in_epoch"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(
                    f"progress: {name} is {getattr(self, name)!r}; expected an integer >= 0."
                )
        for name, kind in (("history", list), ("seen", dict), ("rows_read", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"progress: {name} is a {type(getattr(self, name)).__name__}, not a {kind.__name__}."
                )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run that have state."""

    model: MultiTaskModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    policy: Policy
    loss_scale: LossScale | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment: all that a checkpoint of it holds.

    Args:
        experiment, parts, progress: of the run. The parts are the run's own, which change when it
            goes on.
        data: fingerprint of the samples it trains on; "" if none was given.
        description: of the data, with which the model can be built where the data are not; None
            takes what the experiment's configuration says of a named data set.
    """

    experiment: Experiment
    parts: Parts
    progress: Progress
    data: str = ""
    description: DataDescription | None = None

    def contents(self) -> Contents:
        """The files of a checkpoint of this moment."""
        state, loss_scale = io.BytesIO(), self.parts.loss_scale
        scaled = {} if loss_scale is None else {"loss_scale": loss_scale.state_dict()}
        torch.save(
            {
                "format": FORMAT,
                "progress": asdict(self.progress),
                "model": self.parts.model.state_dict(),
                "optimizer": self.parts.optimizer.state_dict(),
                "scheduler": self.parts.scheduler.state_dict(),
                "policy": self.parts.policy.state_dict(),
                **scaled,
            },
            state,
        )
        description = self.description or describe_config(
            self.experiment.data, self.experiment.tasks
        )
        files = {
            EXPERIMENT_FILE: (json.dumps(to_dict(self.experiment), indent=2) + "\n").encode(),
            DATA_FILE: (json.dumps(to_dict(description), indent=2) + "\n").encode(),
            STATE_FILE: state.getvalue(),
        }
        marker = Marker(
            files=checkpoint_manager.describe(files),
            epochs_done=self.progress.epochs_done,
            step_in_epoch=self.progress.step_in_epoch,
            global_step=self.progress.global_step,
            history=self.progress.history,
            data=self.data,
        )
        return Contents(files=files, marker=marker)

    def save(self, directory: str | Path) -> None:
        """Writes a checkpoint to a new folder or URI; it is none before its last file is there.

        Raises:
            StorageError: the storage refused it.
        """
        checkpoint_manager.write_contents(str(directory), self.contents())


def load(
    directory: str | Path,
    *,
    experiment: Experiment,
    parts: Parts,
    data: str = "",
    description: DataDescription | None = None,
) -> Progress:
    """Restores the parts from a checkpoint of the same experiment.

    Raises:
        ValueError: torn, damaged, not a checkpoint, another format, tensors that do not fit.
        ExperimentError: another experiment's (the fields that differ are named), or trained on
            other samples.
    """
    state = read_state(directory)
    stored = read_experiment(directory)
    if stored != experiment:
        raise ExperimentError(
            f"checkpoint {directory} belongs to another experiment: {differences(stored, experiment)}. "
            "Resume with the same configuration, or start under a new name."
        )
    differs = "" if description is None else _described_otherwise(directory, description)
    if differs:
        raise ExperimentError(
            f"checkpoint {directory} was trained with other settings of the data: {differs}. "
            "Resume with the same ones, or start under a new name."
        )
    before = checkpoint_manager.read_marker(str(directory)).data
    if data and before and before != data:
        raise ExperimentError(
            f"checkpoint {directory} was trained on other samples (fingerprint {before}, now {data}): the data changed. "
            "Put it back as it was, or start under a new name."
        )
    check_tensors(f"checkpoint {directory}", state["model"], parts.model.state_dict())
    try:
        progress = Progress(**state["progress"])
        parts.model.load_state_dict(state["model"])
        optimizer, scheduler = _with_own_settings(state, parts)
        parts.optimizer.load_state_dict(optimizer)
        parts.scheduler.load_state_dict(scheduler)
        parts.policy.load_state_dict(state["policy"])
        if parts.loss_scale is not None:
            parts.loss_scale.load_state_dict(state["loss_scale"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"checkpoint {directory} does not fit the experiment that it names: {brief(error)}. It was changed "
            "after it was written, or by another version."
        ) from error
    return progress


def _with_own_settings(
    state: Mapping[str, Any], parts: Parts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stored states of optimiser and schedule with the settings of the run that goes on from
    them. These differ from the stored ones only after `takeover.take_over`.

    Args:
        state: of the checkpoint.
        parts: as their experiment makes them.
    """
    rates = list(parts.scheduler.base_lrs)
    now = [
        rate * factor(state["scheduler"]["last_epoch"])
        for rate, factor in zip(rates, parts.scheduler.lr_lambdas, strict=True)
    ]
    groups = [
        {**stored, **{name: own[name] for name in OWN_SETTINGS if name in own}, "lr": rate}
        for stored, own, rate in zip(
            state["optimizer"]["param_groups"], parts.optimizer.param_groups, now, strict=True
        )
    ]
    return (
        {**state["optimizer"], "param_groups": groups},
        {**state["scheduler"], "base_lrs": rates, "_last_lr": now},
    )


def read_state(directory: str | Path) -> dict[str, Any]:
    """The raw state of a checkpoint: progress, model, optimizer, scheduler, policy; on the CPU.

    Raises:
        ValueError: as `load`; nothing in the file was run.
    """
    directory = str(directory)
    path = f"{directory}/{STATE_FILE}"
    content = checkpoint_manager.read_file(
        directory, STATE_FILE, checkpoint_manager.read_marker(directory)
    )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise almost anything
        # Not torch's own message: for code in a file it explains how to run it all the same.
        raise ValueError(
            f"checkpoint {path} cannot be read as tensors and plain values ({type(error).__name__}): it is damaged, or not "
            "of this project. Take the one before it."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"checkpoint {path} holds a {type(state).__name__}, not the state of a run; it is not of this project."
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state.get('format')!r}; this version reads format {FORMAT}."
        )
    missing = sorted(STATE_KEYS - state.keys())
    if missing:
        raise ValueError(f"checkpoint {path} lacks {', '.join(missing)}; take the one before it.")
    return state


def read_experiment(directory: str | Path) -> Experiment:
    """The experiment that a checkpoint belongs to.

    Raises:
        ValueError: no such file, or one that describes no experiment of this version.
    """
    directory = str(directory)
    content = checkpoint_manager.read_file(
        directory, EXPERIMENT_FILE, checkpoint_manager.read_marker(directory)
    )
    try:
        return from_dict(Experiment, json.loads(content))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {directory}/{EXPERIMENT_FILE} does not describe an experiment of this version: {error}"
        ) from error


def read_description(directory: str | Path) -> DataDescription:
    """What the data of a checkpoint were: tasks, image size and normalisation.

    Raises:
        ValueError: a file that describes no data, or a checkpoint of the user's own data from a
            version that did not describe them.
    """
    directory = str(directory)
    marker = checkpoint_manager.read_marker(directory)
    if DATA_FILE not in marker.files:
        experiment = read_experiment(directory)
        return missing_description(f"checkpoint {directory}", experiment)
    content = checkpoint_manager.read_file(directory, DATA_FILE, marker)
    return description_from(content, f"checkpoint {directory}/{DATA_FILE}")


def description_from(content: str | bytes, where: str) -> DataDescription:
    """A description from its file.

    Raises:
        ValueError: it is none of this version.
    """
    try:
        return from_dict(DataDescription, json.loads(content))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} does not describe the data of a model: {error}") from error


def missing_description(where: str, experiment: Experiment) -> DataDescription:
    """What the configuration says, for models that were stored before descriptions were.

    Raises:
        ValueError: the data were the user's own, of which the configuration says nothing.
    """
    if experiment.data.name == "custom":
        raise ValueError(
            f"{where} has no {DATA_FILE}: it was written by a version that did not store the tasks and "
            "the image size of data of your own, without which its model cannot be built. Continue "
            "the run with this version, which writes them, or train again."
        )
    return describe_config(experiment.data, experiment.tasks)


def _described_otherwise(directory: str | Path, description: DataDescription) -> str:
    """What differs from the description that is stored; empty if nothing does or none is stored."""
    if DATA_FILE not in checkpoint_manager.read_marker(str(directory)).files:
        return ""
    return data_differences(read_description(directory), description)


def build_stored_model(
    experiment: Experiment, data: DataDescription, make_model: ModelFunction | None = None
) -> MultiTaskModel:
    """The model that stored weights are for; its own weights are of no meaning.

    Args:
        experiment: of the run.
        data: of the run.
        make_model: the function that made a model of the user's own.

    Raises:
        ValueError: a model of the user's own without its function, or with another.
    """
    if experiment.model.encoder == OWN_MODEL:
        if make_model is None:
            raise ValueError(
                "the model is the user's own code, which no file holds; hand over the function that "
                "makes it: load_model(source, model=...)"
            )
        own = stored_own_model(make_model, data.tasks)
        return own.double() if experiment.precision == "float64" else own
    # The weights are stored: nothing of the hub or of another file is needed.
    config = dataclasses.replace(experiment.model, pretrained=False, weights=None)
    assert data.image_size is not None, "encoders of timm see images"
    model = build_model(
        config, data.tasks, image_size=data.image_size, penalized=False, normalize=data.normalize
    )
    return model.double() if experiment.precision == "float64" else model


def read_model(directory: str | Path, make_model: ModelFunction | None = None) -> MultiTaskModel:
    """The model of a checkpoint, on the CPU, in eval mode. The data are not needed.

    Args:
        directory: of the checkpoint, path or URI.
        make_model: the function that made a model of the user's own.

    Raises:
        ValueError: as `read_state`, `read_experiment` and `read_description`; or weights that do not
            fit the experiment beside them, which then is another's.
    """
    experiment, state = read_experiment(directory), read_state(directory)
    model = build_stored_model(experiment, read_description(directory), make_model)
    check_tensors(f"checkpoint {directory}", state["model"], model.state_dict())
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {directory} holds the weights of another configuration than its "
            f"{EXPERIMENT_FILE} describes: {brief(error)}"
        ) from error
    return model.eval()


def brief(error: BaseException) -> str:
    """The beginning of another library's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
