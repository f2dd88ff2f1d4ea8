"""The command that continues what was interrupted."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repmtl_ray.cli.interruption import command


@pytest.mark.parametrize(
    ("typed", "kind", "directory", "expected"),
    [
        ("train.py a.json", "run", "/s/fit-1", "train.py a.json --name fit-1"),
        ("train.py a.json --name x", "run", "/s/x", "train.py a.json --name x"),
        ("t.py --name=x --seed 1", "search", "/s/x", "t.py --seed 1 --resume x"),
        ("t.py --resume x", "search", "s3://b/x?region=y", "t.py --resume x"),
        (
            "b.py scenes --out 'my results'",
            "benchmark",
            "/s/b",
            "b.py scenes --out 'my results' --resume b",
        ),
        (
            "prepare_data.py nyuv2 --out /o",
            "preparation",
            "/o/.prepared",
            "prepare_data.py nyuv2 --out /o",
        ),
        ("t.py --seed 1", "", "", "t.py --seed 1"),
    ],
)
def test_the_command_is_the_typed_one_with_the_name(
    typed: str, kind: str, directory: str, expected: str
) -> None:
    assert command(shlex.split(typed), kind, directory) == f"python {expected}"


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("/venv/bin/repmtl-ray", "repmtl-ray"),
        ("/lib/repmtl_ray/__main__.py", "python -m repmtl_ray"),
    ],
)
def test_the_console_command_is_continued_as_it_was_typed(started: str, words: str) -> None:
    typed = [started, "tune", "cityscapes", "--seed", "1"]
    found = command(typed, "search", "/s/tune-1")
    assert found == f"{words} tune cityscapes --seed 1 --resume tune-1"


RECIPE = """
import sys, time
from repmtl_ray import cli, run_lock

def main():
    with run_lock.hold(sys.argv[1], "search"):
        print("ready", flush=True)
        {work}

cli.run_to_end(main)
"""
SLEEP = "time.sleep(60)"
DEAF = """
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("work", [SLEEP, DEAF], ids=["sleep", "deaf"])
def test_a_signal_ends_a_recipe_with_the_command_that_continues_it(
    tmp_path: Path, number: signal.Signals, work: str
) -> None:
    if work is DEAF and number is not signal.SIGINT:
        pytest.skip("one signal shows it")
    process = subprocess.Popen(
        [sys.executable, "-c", RECIPE.format(work=work.strip()), str(tmp_path / "study")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted ({number.name}): the search is in {tmp_path}/study" in errors
    assert errors.strip().endswith("--resume study")
    assert '"interrupted"' in (tmp_path / "study/status.json").read_text()
    assert not (tmp_path / "study/lock.json").exists()
