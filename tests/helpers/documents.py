"""What the recipes offer, as documents must name it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from repmtl_ray.cli import options
from tests.helpers.paths import ROOT


def options_of(recipe: Path) -> set[str]:
    """Every option in a recipe's source, with those of the shared functions that it calls."""
    text = recipe.read_text()
    for sign, file in {
        "search_parser": "cli/search.py",
        "cli_benchmark": "cli/benchmark.py",
        "repmtl_ray.planning import command": "planning/command.py",
    }.items():
        if sign in text:
            text += (ROOT / "repmtl_ray" / file).read_text()
    added: set[str] = set()
    while missing := {n for n in re.findall(r"(add_\w+)\(", text) if hasattr(options, n)} - added:
        added |= missing
        text += "".join(inspect.getsource(getattr(options, name)) for name in missing)
    return set(re.findall(r'"(--[a-z][a-z-]+)"', text))
