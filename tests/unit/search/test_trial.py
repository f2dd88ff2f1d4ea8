"""What a trial in its own process hears of its node, and what its driver reads of its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from repmtl_ray import ray_compat
from repmtl_ray.ray_compat import PreemptionNotice
from repmtl_ray.search import trial


def test_a_notice_is_looked_for_once_a_second_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, notice, looks = [0.0], [None, PreemptionNotice(90.0), None], []

    def look() -> PreemptionNotice | None:
        looks.append(now[0])
        return notice[len(looks) - 1]

    monkeypatch.setattr(trial.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray_compat, "node_notice", look)
    noticed = trial._NodeNotice()
    heard = []
    for now[0] in (0.0, 0.5, 1.0, 1.9, 2.5):
        heard.append(noticed())
    assert looks == [0.0, 1.0, 2.5]
    assert heard == [None, None, *[PreemptionNotice(90.0)] * 3]


@pytest.mark.parametrize(
    ("failures", "is_lost"),
    [
        (["The actor died unexpectedly before finishing this task.\n\tclass_name: X"], True),
        (["ray::InProcessTrial.train() (pid=1)\nRuntimeError: shapes differ"], False),
        (["The actor died because its node has died.", "ray::X.train()\nKeyError: 'a'"], False),
    ],
)
def test_the_last_failure_says_whether_the_process_was_lost(
    tmp_path: Path, failures: list[str], is_lost: bool
) -> None:
    """The file is as Ray Tune writes it."""
    file = tmp_path / "error.txt"
    file.write_text(
        "".join(
            f"Failure # {number} (occurred at 2026-11-27_06-00-00)\n{failure}\n"
            for number, failure in enumerate(failures, start=1)
        )
    )
    assert ray_compat.trial_lost_its_process(SimpleNamespace(error_file=str(file))) is is_lost
    assert not ray_compat.trial_lost_its_process(SimpleNamespace(error_file=None))
