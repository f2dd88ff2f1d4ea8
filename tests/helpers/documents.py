"""What the commands offer, as documents must name it."""

from __future__ import annotations

from pathlib import Path

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
