"""Commands of `repmtl-ray`, called in this process."""

from __future__ import annotations

from repmtl_ray import cli
from repmtl_ray.cli import commands


def call(command: str, *words: object) -> None:
    """Reads the options of a command and runs it; a user's mistake is raised, not printed."""
    arguments = cli.parser_of(command).parse_args([str(word) for word in words])
    commands.module(command).run(arguments)
