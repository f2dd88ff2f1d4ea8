"""A run that goes on from a checkpoint is the run that never stopped; files that are no checkpoint
of this run get one clear error."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray import storage
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment, ExperimentError, replace
from repmtl_ray.runs import checkpoint, loop, loss_scale
from repmtl_ray.runs.checkpoint import DATA_FILE, EXPERIMENT_FILE, STATE_FILE, Progress
from repmtl_ray.runs.checkpoint_manager import MARKER_FILE, describe
from tests.helpers.asserts import assert_same
from tests.helpers.training import run, small_experiment, state_of

FILES = (STATE_FILE, EXPERIMENT_FILE, DATA_FILE, MARKER_FILE)

pytestmark = pytest.mark.usefixtures("scenes_cache")

PLAIN = {"regularizer__lambda_tsr": 0.0, "regularizer__lambda_csa": 0.0}
WITH_DROPOUT = {
    "model__head": "aspp",
    "model__head_channels": 8,
    "model__atrous_rates": [1, 2],
    "model__dropout": 0.5,
}
RUNS = {
    "EW and Rep-MTL": {},
    "dropout": WITH_DROPOUT,
    "schedule": {"optimizer__halve_at_epoch": 3},
    "bfloat16, SGD": {"precision": "bfloat16", "optimizer__name": "sgd"},
    "float64, AdamW": {"precision": "float64", "optimizer__name": "adamw"},
    "UW": {"policy__name": "UW"},
    "IMTL-L": {"policy__name": "IMTL-L"},
    "DWA": {"policy__name": "DWA", "policy__log_losses": False, **PLAIN},
    "RLW": {"policy__name": "RLW"},
    "FAMO": {"policy__name": "FAMO", **PLAIN},
    "STCH": {"policy__name": "STCH", "policy__arguments": {"warmup_epochs": 2}, **PLAIN},
    "PCGrad": {"policy__name": "PCGrad"},
    "GradDrop": {"policy__name": "GradDrop", **PLAIN},
    "MGDA with momentum": {
        "policy__name": "MGDA",
        "policy__arguments": {"momentum_of_weights": 0.5},
    },
}


def disturb_global_generators() -> None:
    """A fresh process has none of the draws of the one before it."""
    torch.manual_seed(12345)
    np.random.seed(12345)
    random.seed(12345)


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_a_run_that_goes_on_inside_its_third_epoch_is_the_unbroken_run(
    overrides: Any, tmp_path: Path
) -> None:
    experiment = small_experiment(epochs=4, **overrides)
    unbroken = run(experiment, checkpoints=tmp_path, save_at=[5])
    disturb_global_generators()
    resumed = run(experiment, resume_from=unbroken.inside[5])
    assert [metrics["epoch"] for metrics in resumed.reported] == [3, 4]
    assert resumed.history == unbroken.history
    assert_same(state_of(resumed.parts), state_of(unbroken.parts))


def test_a_run_in_float16_goes_on_with_its_scale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    experiment = small_experiment(epochs=3, precision="float16")
    unbroken = run(experiment, checkpoints=tmp_path, save_at=[3])
    resumed = run(experiment, resume_from=unbroken.inside[3])
    assert len({metrics["loss_scale"] for metrics in unbroken.history}) > 1
    assert resumed.parts.loss_scale == unbroken.parts.loss_scale
    assert resumed.history == unbroken.history
    assert_same(state_of(resumed.parts), state_of(unbroken.parts))


def test_every_epoch_is_a_place_to_go_on_from(tmp_path: Path) -> None:
    experiment = small_experiment(epochs=4, policy__name="UW")
    unbroken = run(experiment, checkpoints=tmp_path)
    for done, directory in unbroken.checkpoints.items():
        resumed = run(experiment, resume_from=directory)
        assert len(resumed.reported) == 4 - done
        assert resumed.history == unbroken.history
        assert_same(state_of(resumed.parts), state_of(unbroken.parts))


@pytest.fixture(scope="module")
def experiment() -> Any:
    return small_experiment(epochs=2, policy__name="UW", optimizer__halve_at_epoch=1)


@pytest.fixture(scope="module")
def trained(
    experiment: Experiment, scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A run with its checkpoints, which tests leave as they are."""
    return run(experiment, checkpoints=tmp_path_factory.mktemp("trained"))


@pytest.fixture
def saved(trained: Any, tmp_path: Path) -> Path:
    """A copy of its first checkpoint, for a test to spoil."""
    for name in FILES:
        (tmp_path / name).write_bytes((trained.checkpoints[1] / name).read_bytes())
    return tmp_path


@pytest.fixture
def parts(experiment: Experiment) -> Any:
    return untrained(experiment)


def untrained(experiment: Experiment) -> Any:
    tasks = loop.selected_tasks(experiment)
    return loop.build(experiment, tasks, device=torch.device("cpu"), workers=ALONE)


def test_load_returns_the_progress_and_restores_all_parts(
    experiment: Experiment, trained: Any, parts: Any
) -> None:
    progress = checkpoint.load(trained.checkpoints[2], experiment=experiment, parts=parts)
    assert progress == Progress(
        epochs_done=2, global_step=4, seed=experiment.seed, history=trained.history
    )
    assert_same(state_of(parts), state_of(trained.parts))
    moments = parts.optimizer.state_dict()["state"]
    assert moments
    assert all(entry["exp_avg_sq"].any() for entry in moments.values())
    assert parts.scheduler.get_last_lr() == [experiment.optimizer.learning_rate / 2]


def spoil(directory: Any, name: str, content: Any) -> None:
    """Changes a file as somebody does who knows the format: the marker is made to fit."""
    (directory / name).write_bytes(content)
    marker = json.loads((directory / MARKER_FILE).read_text())
    marker["files"] |= describe({name: content})
    (directory / MARKER_FILE).write_text(json.dumps(marker))


def test_a_checkpoint_is_files_of_plain_values(experiment: Experiment, trained: Any) -> None:
    directory = trained.checkpoints[2]
    assert {path.name for path in directory.iterdir()} == set(FILES)
    assert checkpoint.read_experiment(directory) == experiment
    state = checkpoint.read_state(directory)
    assert set(state) == set(checkpoint.STATE_KEYS)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for part in value.values():
                check(part)
        elif isinstance(value, list | tuple):
            for part in value:
                check(part)
        else:
            assert value is None or isinstance(value, torch.Tensor | int | float | str), value

    check(state)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"regularizer.lambda_tsr": 0.1}, "regularizer.lambda_tsr was 0.9, is 0.1"),
        ({"data.num_train": 12}, "data.num_train was 8, is 12"),
        ({"tasks": ["segmentation", "depth"]}, r"tasks was None, is \['segmentation', 'depth'\]"),
        (
            {"policy.arguments": {"learning_rate": 0.5}},
            "policy.arguments.learning_rate was absent, is 0.5",
        ),
        ({"epochs": 3, "batch_size": 2}, "batch_size was 4, is 2, epochs was 2, is 3"),
    ],
)
def test_another_experiments_checkpoint_is_refused_by_the_fields_that_differ(
    experiment: Experiment, trained: Any, overrides: dict[str, Any], named: str
) -> None:
    other = replace(experiment, overrides)
    fresh = untrained(other)
    before = state_of(untrained(other))
    message = rf"{trained.checkpoints[1]} belongs to another experiment: {named}\. Resume"
    with pytest.raises(ExperimentError, match=message):
        checkpoint.load(trained.checkpoints[1], experiment=other, parts=fresh)
    assert_same(state_of(fresh), before)
    with pytest.raises(ExperimentError, match=message):
        run(other, resume_from=trained.checkpoints[1])


def refused(experiment: Experiment, directory: Any, parts: Any, message: str) -> str:
    """The error of a checkpoint that cannot be loaded, which left the parts alone."""
    before = state_of(untrained(experiment))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(directory, experiment=experiment, parts=parts)
    assert str(directory) in str(caught.value)
    assert_same(state_of(parts), before)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_state_is_refused(
    experiment: Experiment, saved: Path, parts: Any, share: float
) -> None:
    whole = (saved / STATE_FILE).read_bytes()
    (saved / STATE_FILE).write_bytes(whole[: int(share * len(whole))])
    refused(experiment, saved, parts, rf"is torn: \d+ bytes of {len(whole)}\. Take the one before")
    spoil(saved, STATE_FILE, whole[: int(share * len(whole))])
    refused(experiment, saved, parts, "cannot be read .*damaged, or not of this project")


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n" * 50,
        b'{"format": 1}',
        b"PK\x03\x04" + bytes(200),
        pickle.dumps(["a", 1]),
        b"\x80\x02.",
        np.random.default_rng(0).bytes(500),
        np.random.default_rng(1).bytes(500),
    ],
    ids=["text", "json", "zip", "pickle", "empty pickle", "noise", "other noise"],
)
def test_a_file_that_is_no_state_is_refused(
    experiment: Experiment, saved: Path, parts: Any, content: Any
) -> None:
    spoil(saved, STATE_FILE, content)
    refused(experiment, saved, parts, "not of this project")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _state: torch.zeros(3), "holds a Tensor, not the state of a run"),
        (lambda _state: [1, 2], "holds a list, not the state of a run"),
        (lambda state: state | {"format": 1}, "has format 1; this version reads format 2"),
        (lambda state: {"model": state["model"]}, "has format None; this version reads format 2"),
        (
            lambda state: {k: v for k, v in state.items() if k not in ("policy", "optimizer")},
            "lacks optimizer, policy",
        ),
    ],
)
def test_what_another_program_or_version_saved_is_refused(
    experiment: Experiment, saved: Path, parts: Any, change: Callable[..., Any], message: str
) -> None:
    spoil_state(saved, change)
    refused(experiment, saved, parts, message)


def spoil_state(directory: Any, change: Any) -> None:
    file = io.BytesIO()
    torch.save(change(torch.load(directory / STATE_FILE, weights_only=True)), file)
    spoil(directory, STATE_FILE, file.getvalue())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "progress": {"epochs_done": -1}},
        lambda state: {**state, "progress": {"epochs": 1}},
        lambda state: {**state, "progress": 3},
        lambda state: {**state, "model": {}},
        lambda state: {
            **state,
            "model": {k: v[..., :1] for k, v in state["model"].items() if v.dim()},
        },
        lambda state: {**state, "optimizer": {"state": {}, "param_groups": []}},
        lambda state: {**state, "scheduler": None},
        lambda state: {**state, "policy": {}},
    ],
    ids=["negative", "unknown", "number", "empty", "shapes", "groups", "scheduler", "policy"],
)
def test_a_state_that_does_not_fit_is_one_clear_error(
    experiment: Experiment, saved: Path, parts: Any, change: Callable[..., Any]
) -> None:
    spoil_state(saved, change)
    with pytest.raises(ValueError, match="does not fit the experiment that it names"):
        checkpoint.load(saved, experiment=experiment, parts=parts)


def test_a_checkpoint_of_other_samples_is_refused(
    experiment: Experiment, saved: Path, parts: Any, trained: Any
) -> None:
    progress = Progress(epochs_done=1, history=trained.history[:1])
    at = saved / "new"
    checkpoint.Snapshot(
        experiment=experiment, parts=trained.parts, progress=progress, data="aa"
    ).save(at)
    assert checkpoint.load(at, experiment=experiment, parts=parts, data="aa") == progress
    with pytest.raises(ExperimentError, match=r"other samples \(fingerprint aa, now bb\)"):
        checkpoint.load(at, experiment=experiment, parts=parts, data="bb")


@pytest.mark.parametrize("place", [{"step_in_epoch": 3, "global_step": 5}, {"global_step": 3}])
def test_a_place_that_no_epoch_has_is_refused(
    experiment: Experiment, saved: Path, place: dict[str, int]
) -> None:
    spoil_state(saved, lambda state: {**state, "progress": {**state["progress"], **place}})
    with pytest.raises(ExperimentError, match="but an epoch has 2 steps: the data changed"):
        run(experiment, resume_from=saved)


class RunsCode:
    """What an attacker puts into a pickle."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return type(self.target).mkdir, (self.target,)


@pytest.mark.parametrize("by_torch", [True, False])
def test_code_in_a_checkpoint_is_not_run(
    experiment: Experiment, saved: Path, parts: Any, by_torch: bool
) -> None:
    target = saved / "ran"
    if by_torch:
        spoil_state(saved, lambda state: state | {"policy": RunsCode(target)})
    else:
        spoil(saved, STATE_FILE, pickle.dumps(RunsCode(target)))
    message = refused(experiment, saved, parts, "cannot be read as tensors and plain values")
    assert not target.exists()
    assert "weights_only" not in message, "a user must not learn how to run it all the same"
    pickle.loads(pickle.dumps(RunsCode(target)))
    assert target.exists(), "the attack itself works"


def test_incomplete_checkpoints_are_refused(
    experiment: Experiment, saved: Path, parts: Any
) -> None:
    (saved / EXPERIMENT_FILE).unlink()
    refused(experiment, saved, parts, "has no experiment.json; it is torn")
    (saved / STATE_FILE).unlink()
    refused(experiment, saved, parts, "has no state.pt; it is torn")
    (saved / MARKER_FILE).unlink()
    refused(experiment, saved, parts, "has no complete.json: .*never completed")
    refused(experiment, saved / "nowhere", parts, "has no complete.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not describe an experiment of this version: Expecting"),
        ("[1]", "does not describe an experiment"),
        (json.dumps({"data": {"name": "cityscapes"}, "epoch": 1}), "did you mean 'epochs'"),
    ],
)
def test_an_experiment_file_that_describes_none_is_refused(
    experiment: Experiment, saved: Path, parts: Any, content: Any, message: str
) -> None:
    spoil(saved, EXPERIMENT_FILE, content.encode())
    refused(experiment, saved, parts, message)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_crash_while_saving_leaves_no_checkpoint(
    experiment: Experiment,
    parts: Any,
    trained: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """After no file, one, or two of the three."""
    written = []
    original = storage.write

    def crashing(location: Any, data: Any) -> None:
        if len(written) == number:
            raise MemoryError
        written.append(location)
        original(location, data)

    monkeypatch.setattr(storage, "write", crashing)
    with pytest.raises(MemoryError):
        checkpoint.Snapshot(experiment=experiment, parts=trained.parts, progress=Progress()).save(
            tmp_path
        )
    refused(experiment, tmp_path, parts, "has no complete.json: .*never completed")
