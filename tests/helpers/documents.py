"""What the recipes offer, as documents must name it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from repmtl_ray import cli
from tests.helpers.paths import ROOT


def options_of(recipe: Path) -> set[str]:
    """Every option in a recipe's source, with those that searches share."""
    text = recipe.read_text()
    if "search_parser" in text:
        text += (ROOT / "repmtl_ray" / "cli" / "__init__.py").read_text()
    if "cli_benchmark" in text:
        text += (ROOT / "repmtl_ray" / "cli" / "benchmark.py").read_text()
    if "repmtl_ray.planning import command" in text:
        text += (ROOT / "repmtl_ray" / "planning" / "command.py").read_text()
    for helper in re.findall(r"cli\.(add_\w+)\(", text):
        text += inspect.getsource(getattr(cli, helper))
    return set(re.findall(r'"(--[a-z][a-z-]+)"', text))
