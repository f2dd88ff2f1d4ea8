"""What a search prints while it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from repmtl_ray.search.progress import Progress, label_of
from tests.helpers.searches import POLICY, TSR


def test_progress_prints_a_line_a_trial_and_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("repmtl_ray.search.progress.time.monotonic", lambda: now[0])
    where = "2 data actors on node 3f2a91c0 (10.0.0.7)"
    monkeypatch.setattr("repmtl_ray.search.progress.cluster.data_actors", lambda: where)
    waiting = "a machine is starting"
    monkeypatch.setattr("repmtl_ray.search.progress.cluster.waiting_for", lambda: waiting)
    progress = Progress(4, "delta_p_task")

    def trial(name: str, **last: Any) -> SimpleNamespace:
        return SimpleNamespace(
            trial_id=name,
            config={"run": SimpleNamespace(label=label_of({POLICY: "EW", TSR: 0.123456}))},
            last_result=last,
        )

    done = trial("a", epoch=4, delta_p_task=1.5)
    stopped, failed = trial("b", epoch=2, delta_p_task=-1.0), trial("c")
    for started in (done, stopped, failed):
        progress.on_trial_start(0, [], started)
    progress.on_trial_result(0, [], stopped, {"epoch": 2})
    progress.on_step_end(0, [])
    assert capsys.readouterr().out == ""
    now[0] = 16.0
    progress.on_step_end(0, [])
    epochs = "running at epoch 0/4, 2/4, 0/4"
    assert capsys.readouterr().out == f"[   16 s] {epochs}; {where}; {waiting}\n"
    progress.on_trial_complete(0, [], done)
    progress.on_trial_complete(0, [], stopped)
    progress.on_trial_error(0, [], failed)
    lines = capsys.readouterr().out.splitlines()
    assert "run 1  policy EW  tsr 0.123   done   delta_p_task +1.50 %" in lines[0]
    assert lines[1].endswith("stopped after epoch 2   delta_p_task -1.00 %   best so far +1.50 %")
    assert "run 3" in lines[2]
    assert "failed (the others continue" in lines[2]
    now[0] = 60.0
    progress.on_step_end(0, [])
    assert capsys.readouterr().out == "", "nothing runs any more"


def test_baselines_and_trials_share_one_clock_and_one_numbering(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("repmtl_ray.search.progress.time.monotonic", lambda: now[0])
    progress = Progress(4, "delta_p_task")
    baseline = SimpleNamespace(
        trial_id="a",
        config={"run": SimpleNamespace(label="single-task depth")},
        last_result={"epoch": 4},
    )
    trial = SimpleNamespace(
        trial_id="b",
        config={"run": SimpleNamespace(label=label_of({POLICY: "EW"}))},
        last_result={"epoch": 4, "delta_p_task": 1.0},
    )
    for second, finished in ((30.0, baseline), (70.0, trial)):
        now[0] = second
        progress.on_trial_complete(0, [], finished)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[   30 s] run 1  single-task depth   done"
    assert lines[1].startswith("[   70 s] run 2  policy EW   done   delta_p_task +1.00 %")
