"""The line about a lost worker, with a dictionary in place of the store of Ray's head."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from repmtl_ray import ray_compat
from repmtl_ray.runs.worker_loss import LossPrinter, NoteLosses, RunPosition

LOST = WorkerHealthCheckFailedError("worker 1", ray.exceptions.ActorDiedError())
FOLDER = "/storage/study/runs/abc"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values: dict[str, str] = {}
    monkeypatch.setattr(ray_compat, "put_value", values.__setitem__)
    monkeypatch.setattr(ray_compat, "get_value", values.get)
    monkeypatch.setattr(
        ray_compat, "keys_of_values", lambda prefix: [k for k in values if k.startswith(prefix)]
    )
    return values


def lose(errors: dict[int, Exception]) -> Any:
    context: Any = None
    NoteLosses(FOLDER).after_exception(context, errors)


def test_a_loss_is_one_line_when_the_run_has_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer, position = LossPrinter("/storage/study/runs/"), RunPosition(FOLDER)
    position.note_start(None)
    position.note_step(7)
    lose({1: LOST})
    printer.poll()
    assert capsys.readouterr().out == ""
    position.note_start(f"{FOLDER}/checkpoint_000001_00000003_0a")
    printer.poll()
    printer.poll()
    assert capsys.readouterr().out == (
        "worker 1 of run abc was lost at step 7; the run continues from checkpoint_000001_00000003_0a\n"
    )


def test_a_loss_that_ends_the_run_is_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LossPrinter(FOLDER)
    lose({0: LOST, 1: LOST})
    printer.poll(is_last=True)
    assert capsys.readouterr().out == (
        "worker 0, 1 of run abc was lost before its first step; the run does not continue\n"
    )


def test_an_error_of_the_training_is_no_loss(
    store: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lose({0: ValueError("loss is nan")})
    assert store == {}


def test_losses_of_an_earlier_process_are_not_printed_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lose({0: LOST})
    LossPrinter(FOLDER).poll(is_last=True)
    assert capsys.readouterr().out == ""
