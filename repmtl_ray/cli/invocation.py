"""How this process was started, and how the same user starts another command.

There are three ways: the console command (`repmtl-ray train`), the package (`python -m repmtl_ray
train`) and a recipe of a clone (`python pipelines/train.py`). What a command prints for the user to
type next is of the way that this user took.
"""

from __future__ import annotations

import sys
from pathlib import Path

CONSOLE = "repmtl-ray"
MODULE = "python -m repmtl_ray"
RECIPES = {"inspect": "inspect_data", "plan": "plan_cluster", "prepare": "prepare_data"}
"""The recipes of `pipelines/` whose names are not their commands'."""
WITHOUT_RECIPE = ("evaluate", "predict", "report")


def invocation(command: str) -> str:
    """The words that start a command."""
    start = Path(sys.argv[0])
    if start.suffix != ".py":
        return f"{CONSOLE} {command}"
    if start.name == "__main__.py" or command in WITHOUT_RECIPE:
        return f"{MODULE} {command}"
    return f"python pipelines/{RECIPES.get(command, command.replace(' ', '_'))}.py"


def spoken(text: str, *commands: str) -> str:
    """A text in which every command is written as this user types it.

    Args:
        text: writes them as `repmtl-ray train`.
        commands: those that it names.
    """
    for command in commands:
        text = text.replace(f"{CONSOLE} {command}", invocation(command))
    return text


def program_words(started: str) -> list[str]:
    """The words before the options, to start a process again.

    Args:
        started: its `sys.argv[0]`.
    """
    start = Path(started)
    if start.suffix != ".py":
        return [start.name]
    return MODULE.split() if start.name == "__main__.py" else ["python", started]
