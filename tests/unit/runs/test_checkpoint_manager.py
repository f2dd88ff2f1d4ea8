"""Checkpoints in a run's storage: which are whole, which stay, when one is due; and a run that is
killed at every step is the run that never was."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray import storage
from repmtl_ray.config import Experiment
from repmtl_ray.runs import checkpoint, checkpoint_manager, loop
from repmtl_ray.runs.checkpoint_manager import MARKER_FILE, CheckpointConfig, CheckpointManager
from repmtl_ray.runs.step import Stepper
from tests.helpers.asserts import assert_same
from tests.helpers.stored_runs import STATE, places, small_contents
from tests.helpers.training import small_experiment, split, state_of


class KilledError(Exception):
    pass


def test_the_last_two_and_the_best_stay(tmp_path: Path) -> None:
    found = CheckpointManager(str(tmp_path))
    errors = [0.9, 0.5, 0.7, 0.6, 0.8]
    for epoch in range(1, 6):
        found.write(small_contents(epoch, errors=errors[:epoch]))
        found.write(small_contents(epoch, 2, errors=errors[:epoch]))
    assert places(tmp_path) == [(2, 0), (5, 0), (5, 2)]
    assert found.best().startswith(f"{tmp_path}/checkpoint_000002_00000000")
    assert CheckpointManager(str(tmp_path)).best() == found.best(), "also for a new process"
    assert (
        CheckpointManager(str(tmp_path))
        .latest()
        .startswith(f"{tmp_path}/checkpoint_000005_00000002")
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.pt", "experiment.json", MARKER_FILE])
@pytest.mark.parametrize("damage", [cut, change, lambda path: path.unlink()])
def test_a_torn_checkpoint_is_passed_over_by_name(
    tmp_path: Path, file: Any, damage: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = CheckpointManager(str(tmp_path))
    before, last = (found.write(small_contents(1, step)) for step in (2, 3))
    damage(tmp_path / last.rpartition("/")[2] / file)
    with caplog.at_level(logging.WARNING):
        again = CheckpointManager(str(tmp_path))
        if (file, damage) == (MARKER_FILE, cut):  # its last character is a new line
            assert again.latest() == last
            return
        assert again.latest() == before
    (message,) = again.notes
    assert last in message
    assert f"going on from {before}" in message
    assert message in caplog.text
    again.write(small_contents(1, 3))
    assert places(tmp_path) == [(1, 2), (1, 3)], "the torn one is gone, the one before it is not"
    assert CheckpointManager(str(tmp_path)).latest() not in (before, last)


def test_without_any_whole_checkpoint_a_run_starts_anew_and_says_so(tmp_path: Path) -> None:
    last = CheckpointManager(str(tmp_path)).write(small_contents(1))
    (tmp_path / last.rpartition("/")[2] / "state.pt").write_bytes(b"")
    found = CheckpointManager(str(tmp_path))
    assert found.latest() is None
    assert "there is none before it: starting anew" in found.notes[0]
    assert CheckpointManager(str(tmp_path / "never")).latest() is None


def test_a_storage_that_cannot_be_read_is_not_a_torn_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointManager(str(tmp_path)).write(small_contents(1))
    monkeypatch.setattr(storage, "WAITS_S", ())

    def gone(_location: Any) -> None:
        raise OSError("the bucket is gone")

    monkeypatch.setattr(storage, "open_location", gone)
    with pytest.raises(storage.StorageError, match="the bucket is gone"):
        CheckpointManager(str(tmp_path)).latest()


def test_nothing_stored_is_touched_when_a_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CheckpointManager(str(tmp_path))
    found.write(small_contents(1))
    found.write(small_contents(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    write = storage.write

    def full(location: str, data: bytes) -> None:
        if not location.endswith("state.pt"):
            raise storage.StorageError("full")
        write(location, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        with pytest.raises(storage.StorageError):
            found.write(small_contents(3))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert "checkpoint_000002" in CheckpointManager(str(tmp_path)).latest()
    found.write(small_contents(3, 1))
    assert places(tmp_path) == [(1, 0), (2, 0), (3, 1)], "what was half written is gone"


def test_a_checkpoint_is_due_after_so_many_steps_or_minutes(tmp_path: Path) -> None:
    now = [0.0]
    by_steps = CheckpointManager(str(tmp_path), CheckpointConfig(every_steps=3, every_minutes=None))
    due = []
    for step in range(1, 10):
        if by_steps.should_save(step):
            due.append(step)
            by_steps.write(small_contents(0, step))
    assert due == [3, 6, 9]
    by_time = CheckpointManager(
        str(tmp_path), CheckpointConfig(every_minutes=2), clock=lambda: now[0]
    )
    assert not by_time.should_save(1)
    now[0] = 119.0
    assert not by_time.should_save(2)
    now[0] = 120.0
    assert by_time.should_save(3)
    by_time.write(small_contents(0, 3))
    assert not by_time.should_save(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": 0}, "every_steps is 0; expected at least 1"),
        ({"every_minutes": 0.0}, "every_minutes is 0.0; expected above 0"),
        ({"every_minutes": math.nan}, "every_minutes is nan"),
        ({"keep": 1}, "keep is 1; expected at least 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**settings)


def attempt(
    experiment: Experiment,
    folder: Path,
    *,
    die_at: Any = None,
    before_saving: bool = False,
) -> Any:
    """Goes on from what is there, with a checkpoint after every step, until it is killed."""
    kept = CheckpointManager(str(folder), CheckpointConfig(every_steps=1))

    class Checkpoints:
        folder = kept.folder

        def after_step(self, snapshot: checkpoint.Snapshot) -> None:
            global_step = snapshot.progress.global_step
            if global_step == die_at and before_saving:
                raise KilledError
            kept.write(snapshot.contents())
            if global_step == die_at:
                raise KilledError

        def after_epoch(self, snapshot: checkpoint.Snapshot) -> None:
            kept.write(snapshot.contents())

    return loop.run(
        experiment,
        train=split(experiment, "train"),
        evaluation=split(experiment, "val"),
        checkpoints=Checkpoints(),
        resume_from=kept.latest(),
    )


@pytest.mark.usefixtures("scenes_cache")
def test_killed_at_every_step_it_is_the_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DWA remembers losses inside an epoch; samples are compared by their numbers."""
    experiment = small_experiment(
        policy__name="DWA",
        policy__log_losses=False,
        data__num_train=12,
        epochs=2,
        regularizer__lambda_csa=0.1,
    )
    samples = []
    original = Stepper.step

    def watched(self: Any, batch: Any, *, global_step: Any) -> Any:
        samples.append((global_step + 1, batch.sample_ids.tolist()))
        return original(self, batch, global_step=global_step)

    monkeypatch.setattr(Stepper, "step", watched)
    unbroken, progress = attempt(experiment, tmp_path / "unbroken")
    expected = list(samples)
    samples.clear()
    for step in range(1, 7):
        with pytest.raises(KilledError):
            attempt(experiment, tmp_path / "killed", die_at=step, before_saving=step % 3 == 0)
    survivor, survived = attempt(experiment, tmp_path / "killed")
    assert survived == progress
    assert_same(state_of(survivor), state_of(unbroken))
    again = [entry for entry in samples if samples.count(entry) > 1]
    assert {step for step, _ in again} == {3, 6}, "only steps that were lost are taken again"
    assert sorted(map(str, samples)) == sorted(map(str, [*expected, expected[2], expected[5]]))


@pytest.mark.usefixtures("scenes_cache")
def test_checkpoints_of_two_runs_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first, second = CheckpointManager(str(tmp_path)), CheckpointManager(str(tmp_path))
    paths = {first.write(small_contents(1)), second.write(small_contents(1))}
    assert len(paths) == 2
    for path in paths:
        assert (
            checkpoint_manager.read_file(path, "state.pt", checkpoint_manager.read_marker(path))
            == STATE
        )
    with pytest.raises(ValueError, match="damaged, or not of this project"):
        checkpoint.read_state(path)
