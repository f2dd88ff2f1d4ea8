"""The moments of a run that callbacks see, and what they may add to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from repmtl_ray.delta import delta_p
from repmtl_ray.runs import checkpoint, loop
from repmtl_ray.runs.callbacks import AddDeltaP, Callback, RunContext, StepInfo
from repmtl_ray.runs.checkpoint import Snapshot
from tests.helpers.training import SaveAt, small_experiment, split

pytestmark = pytest.mark.usefixtures("scenes_cache")


class Diary(Callback):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps: list[StepInfo] = []
        self.contexts: list[RunContext] = []

    def on_run_start(self, context: RunContext) -> None:
        self.contexts.append(context)
        self.calls.append(f"start at {context.progress.global_step}")

    def on_step_end(self, step: StepInfo) -> None:
        self.steps.append(step)
        self.calls.append(f"step {step.global_step}")

    def epoch_metrics(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self.calls.append(f"metrics {metrics['epoch']}")
        return {"diary/calls": float(metrics["epoch"])}

    def on_epoch_end(self, metrics: Mapping[str, float]) -> None:
        self.calls.append(f"epoch {metrics['epoch']}")

    def on_run_end(self, error: BaseException | None) -> None:
        self.calls.append(f"end {type(error).__name__}")


class Stored(SaveAt):
    """Keeps the last epoch's snapshot's history in the diary's order."""

    def __init__(self, diary: Diary, places: Mapping[int, Path]) -> None:
        super().__init__(places)
        self.diary = diary

    def after_epoch(self, snapshot: Snapshot) -> None:
        assert snapshot.progress.history[-1]["diary/calls"] == snapshot.progress.epochs_done
        self.diary.calls.append("stored")


def train(diary: Diary, tmp_path: Path, resume_from: Path | None = None) -> loop.Progress:
    experiment = small_experiment()
    _, progress = loop.run(
        experiment,
        train=split(experiment, "train"),
        evaluation=split(experiment, "val"),
        checkpoints=Stored(diary, {3: tmp_path / "at-3"}),
        callbacks=[diary],
        resume_from=resume_from,
    )
    return progress


def test_callbacks_see_every_moment_in_order_also_of_a_continued_run(tmp_path: Path) -> None:
    diary = Diary()
    progress = train(diary, tmp_path)
    first = ["step 1", "step 2", "metrics 1", "stored", "epoch 1"]
    second = ["step 4", "metrics 2", "stored", "epoch 2", "end NoneType"]
    assert diary.calls == ["start at 0", *first, "step 3", *second]
    again = Diary()
    continued = train(again, tmp_path / "again", resume_from=tmp_path / "at-3")
    assert again.calls == ["start at 3", *second]
    assert continued == progress
    assert [row["diary/calls"] for row in progress.history] == [1.0, 2.0]


def test_a_step_says_where_it_is_and_how_long_it_took(tmp_path: Path) -> None:
    diary = Diary()
    progress = train(diary, tmp_path)
    assert [(step.epoch, step.step_in_epoch) for step in diary.steps] == [
        (1, 1), (1, 2), (2, 1), (2, 2)
    ]  # fmt: skip
    for step in diary.steps:
        assert step.num_samples == 4
        assert 0 <= step.wait_seconds <= step.seconds
    losses = [step.metrics["depth/train_loss"] for step in diary.steps]
    assert progress.history[0]["depth/train_loss"] == pytest.approx(sum(losses[:2]) / 2)
    (context,) = diary.contexts
    assert (context.steps_per_epoch, context.folder) == (2, "")
    assert [task.name for task in context.tasks] == ["segmentation", "depth"]


def test_a_run_that_fails_or_is_left_ends_its_callbacks(tmp_path: Path) -> None:
    class Failing(Diary):
        def on_step_end(self, step: StepInfo) -> None:
            raise OSError("the server is gone")

    failing, experiment = Failing(), small_experiment()
    with pytest.raises(OSError, match="the server is gone"):
        train(failing, tmp_path)
    assert failing.calls == ["start at 0", "end OSError"]
    diary = Diary()
    training = loop.Training(
        experiment,
        train=split(experiment, "train"),
        evaluation=split(experiment, "val"),
        callbacks=[diary],
    )
    epochs = training.epochs()
    assert next(epochs)["epoch"] == 1
    epochs.close()
    assert diary.calls[-1] == "end GeneratorExit"
    assert training.progress.epochs_done == 1


def test_delta_p_is_stored_with_the_epoch(tmp_path: Path) -> None:
    experiment = small_experiment(epochs=1)
    splits = {"train": split(experiment, "train"), "evaluation": split(experiment, "val")}
    _, plain = loop.run(experiment, **splits)
    baseline = {name: 2 * value for name, value in plain.history[0].items() if "/" in name}
    _, progress = loop.run(
        experiment,
        **splits,
        callbacks=[AddDeltaP(baseline)],
        report=lambda _, snapshot: snapshot.save(tmp_path / "stored"),
    )
    expected = delta_p(plain.history[0], baseline)
    (stored,) = checkpoint.read_state(tmp_path / "stored")["progress"]["history"]
    assert stored == progress.history[0]
    assert stored["delta_p_task"] == expected.task
    assert stored["delta_p_metric"] == expected.metric
