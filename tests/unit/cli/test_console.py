"""The console command: its help, the command it finds, and how mistakes end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import repmtl_ray
from repmtl_ray import cli
from repmtl_ray.cli import commands, console
from repmtl_ray.cli.invocation import RECIPES, invocation, program_words, spoken
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def started_as_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/repmtl-ray"])


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_lists_every_command_on_one_screen(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    console.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("usage: repmtl-ray ")
    named = [line[2:].partition("  ")[0].strip() for line in lines if line.startswith("  ")]
    assert named == list(commands.COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    console.main(["--version"])
    assert capsys.readouterr().out == f"repmtl_ray {repmtl_ray.__version__}\n"


def test_no_help_loads_torch_or_ray() -> None:
    program = (
        "import sys\n"
        "from repmtl_ray import cli\n"
        "from repmtl_ray.cli import commands, console\n"
        "console.main(['--help'])\n"
        "for name in commands.COMMANDS:\n"
        "    cli.parser_of(name).format_help()\n"
        "    loaded = {'torch', 'ray', 'pandas', 'matplotlib', 'timm'} & set(sys.modules)\n"
        "    assert not loaded, (name, loaded)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize(
    ("typed", "command", "rest"),
    [
        ("tune cityscapes --samples 4", "tune cityscapes", ["--samples", "4"]),
        ("train best.json", "train", ["best.json"]),
        ("inspect", "inspect", []),
    ],
)
def test_a_command_is_one_word_or_two(typed: str, command: str, rest: list[str]) -> None:
    assert console.split(typed.split()) == (command, rest)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trian x", "there is no command 'trian'; did you mean 'train'?"),
        ("nonsense", "there is no command 'nonsense'; --help lists the commands"),
        ("tune", "after 'tune' stands nothing; expected one of cityscapes, office31"),
        ("tune x", "after 'tune' stands 'x'; expected one of cityscapes, office31"),
        ("train", "train needs either the file of an experiment, or --data PATH."),
        ("evaluate", "the following arguments are required: checkpoint; --help lists the options."),
        ("train no.json", "no.json is not a file; give the best.json of a search."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    typed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        console.main(typed.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_debug_shows_where_the_error_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        console.main(["train", "no.json", "--debug"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "in read_experiment" in shown
    assert shown.endswith("\nerror: no.json is not a file; give the best.json of a search.\n")


@pytest.mark.parametrize(
    ("started", "command", "expected"),
    [
        ("/venv/bin/repmtl-ray", "tune cityscapes", "repmtl-ray tune cityscapes"),
        ("/lib/repmtl_ray/__main__.py", "train", "python -m repmtl_ray train"),
        ("pipelines/train.py", "tune cityscapes", "python pipelines/tune_cityscapes.py"),
        ("/clone/pipelines/prepare_data.py", "inspect", "python pipelines/inspect_data.py"),
    ],
)
def test_a_command_is_named_as_this_user_types_it(
    monkeypatch: pytest.MonkeyPatch, started: str, command: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert invocation(command) == expected
    assert spoken(f"type repmtl-ray {command} X", command) == f"type {expected} X"
    usage = " ".join(cli.parser_of(command).format_usage().split())
    assert usage.startswith(f"usage: {expected} ")


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ("/venv/bin/repmtl-ray", ["repmtl-ray"]),
        ("/lib/repmtl_ray/__main__.py", ["python", "-m", "repmtl_ray"]),
        ("pipelines/train.py", ["python", "pipelines/train.py"]),
    ],
)
def test_a_process_is_started_again_by_the_same_words(started: str, words: list[str]) -> None:
    assert program_words(started) == words


def test_every_recipe_is_a_thin_file_that_calls_its_command() -> None:
    recipes = {path.stem: path for path in (ROOT / "pipelines").glob("*.py")}
    for name in commands.COMMANDS:
        recipe = recipes.pop(RECIPES.get(name, name.replace(" ", "_")), None)
        if recipe is not None:
            assert f'cli.main("{name}")' in recipe.read_text()
            assert len(recipe.read_text().splitlines()) <= 20
    assert not recipes, "a recipe without a command"


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")

    def words_after(line: str) -> set[str]:
        answers = tmp_path / "answers"
        environment = {
            **os.environ,
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
            "_ARGCOMPLETE_IFS": "\n",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "",
        }
        program = "from repmtl_ray.cli import console; console.main()"
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
        return {word.strip() for word in answers.read_text().splitlines()}

    assert {"train", "benchmark"} <= words_after("repmtl-ray ")
    assert words_after("repmtl-ray tune ") >= {"cityscapes", "office31"}
    assert words_after("repmtl-ray tune cityscapes --sam") == {"--samples"}
