"""What the commands offer, as documents must name it, and what a notebook prints."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from repmtl_ray import cli
from repmtl_ray.cli import commands
from repmtl_ray.cli.invocation import RECIPES

COMMAND_OF = {RECIPES.get(name, name.replace(" ", "_")): name for name in commands.COMMANDS}
"""By the name of its recipe in `pipelines/`, every command."""


def options_of(recipe: Path) -> set[str]:
    """Every option of a recipe."""
    return options_of_command(COMMAND_OF[recipe.stem])


def options_of_command(command: str) -> set[str]:
    """Every option of a command, without the help that all have."""
    parser = cli.parser_of(command)
    options = {option for action in parser._actions for option in action.option_strings}
    return {option for option in options - {"--help"} if option.startswith("--")}


def run_notebook(notebook: Path) -> list[tuple[str, str]]:
    """Runs the code of a notebook, its cells one after the other in one namespace.

    Returns:
        By cell, what the file says that it prints, and what it printed now; digits left out, because
        another machine rounds otherwise.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    texts = []
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
        stored = "".join("".join(output["text"]) for output in cell["outputs"])
        texts.append((_without_numbers(stored), _without_numbers(printed.getvalue())))
    return texts


def _without_numbers(text: str) -> str:
    return " ".join(re.sub(r"[-+ ]?\d+(\.\d+)?|nan|True|False", "0", text).split())
