"""One run's checkpoints in the folder of another: what is equal to the bit, what may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray.config import Experiment, ExperimentError, replace
from repmtl_ray.runs import checkpoint_manager, loop
from repmtl_ray.runs.checkpoint import Snapshot, read_experiment, read_state
from repmtl_ray.runs.checkpoint_manager import CheckpointManager
from repmtl_ray.runs.takeover import state_digest, take_over
from tests.helpers.asserts import assert_same
from tests.helpers.training import run, small_experiment, split, state_of

pytestmark = pytest.mark.usefixtures("scenes_cache")
RATE, TSR = "optimizer.learning_rate", "regularizer.lambda_tsr"
GIVEN = small_experiment(
    epochs=3, policy__name="UW", regularizer__lambda_tsr=0.5, optimizer__halve_at_epoch=2
)


class Kept:
    """The checkpoints of a run, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.manager = CheckpointManager(self.folder)

    def after_step(self, snapshot: Snapshot) -> None:
        pass

    def after_epoch(self, snapshot: Snapshot) -> None:
        self.manager.write(snapshot.contents())


def training(experiment: Experiment, folder: Path) -> loop.Training:
    return loop.Training(
        experiment,
        train=split(experiment, "train"),
        evaluation=split(experiment, "val"),
        checkpoints=Kept(folder),
        resume_from=CheckpointManager(str(folder)).latest(),
    )


def trained(experiment: Experiment, folder: Path, epochs: int) -> Path:
    """The folder of a run that has ended so many epochs."""
    ended = training(experiment, folder).epochs()
    for _ in range(epochs):
        next(ended)
    ended.close()
    return folder


@pytest.fixture(scope="module")
def source(scenes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(GIVEN, tmp_path_factory.mktemp("source"), 2)


def test_all_that_a_run_remembers_is_the_other_runs_to_the_bit(
    source: Path, tmp_path: Path
) -> None:
    wanted = replace(GIVEN, {RATE: 1e-4, TSR: 0.1})
    weak = trained(replace(GIVEN, {RATE: 5e-4, TSR: 0.9}), tmp_path, 2)
    take_over(str(source), str(weak), wanted, epoch=2, may_change=[RATE, TSR])
    ours, theirs = (CheckpointManager(str(folder)).latest() for folder in (weak, source))
    assert ours is not None
    assert theirs is not None
    assert (Path(ours) / "state.pt").read_bytes() == (Path(theirs) / "state.pt").read_bytes()
    assert read_experiment(ours) == wanted
    assert state_digest(str(weak)) == state_digest(str(source))
    found, expected = training(wanted, weak), training(GIVEN, source)
    assert found.progress == expected.progress
    states = [state_of(each.parts) for each in (found, expected)]
    assert_same(states[0]["model"], states[1]["model"])
    for part in ("optimizer", "policy"):
        assert_same(states[0][part], states[1][part])
    # The rate is this run's, halved since epoch 2 as its schedule says.
    assert found.parts.optimizer.param_groups[0]["lr"] == 1e-4 / 2
    assert expected.parts.optimizer.param_groups[0]["lr"] == 3e-3 / 2


def test_the_same_values_give_the_same_run(source: Path, tmp_path: Path) -> None:
    """Epoch 3 after a takeover is the other run's own epoch 3."""
    take_over(str(source), str(tmp_path), GIVEN, epoch=2, may_change=[RATE])
    assert list(training(GIVEN, tmp_path).epochs()) == [run(GIVEN).history[-1]]


def test_changed_values_are_trained_with(source: Path, tmp_path: Path) -> None:
    wanted = replace(GIVEN, {RATE: 1e-12})
    take_over(str(source), str(tmp_path), wanted, epoch=2, may_change=[RATE])
    going = training(wanted, tmp_path)
    before = {name: value.clone() for name, value in going.parts.model.named_parameters()}
    (metrics,) = going.epochs()
    assert metrics["epoch"] == 3
    for name, value in going.parts.model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, r"batch_size was 4, is 2; only optimizer.learning_rate may differ"),
        ({TSR: 0.1}, r"regularizer.lambda_tsr was 0.5, is 0.1"),
        ({"seed": 1, RATE: 0.1}, r"cannot be taken over: seed was 0, is 1; only"),
    ],
)
def test_nothing_else_may_differ(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExperimentError, match=message):
        take_over(str(source), str(tmp_path), replace(GIVEN, changes), epoch=2, may_change=[RATE])
    assert not list(tmp_path.iterdir())


def test_the_best_epoch_is_the_other_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of that number which this run had."""
    monkeypatch.setattr(checkpoint_manager, "best_epoch", lambda history: 1)
    weak = trained(replace(GIVEN, {RATE: 5e-4}), tmp_path, 2)
    take_over(str(source), str(weak), GIVEN, epoch=2, may_change=[RATE])
    best, expected = (CheckpointManager(str(folder)).best() for folder in (weak, source))
    assert best is not None
    assert expected is not None
    assert Path(best).name.startswith("checkpoint_000001_")
    assert_same(read_state(best)["model"], read_state(expected)["model"])
    assert len(list(weak.iterdir())) == 2


def test_a_run_that_has_gone_on_is_not_taken_over(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint of the end of epoch 1 to take over"):
        take_over(str(source), str(tmp_path), GIVEN, epoch=1, may_change=[RATE])
    assert state_digest(str(tmp_path)) == (0, "")
