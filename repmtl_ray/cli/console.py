"""The console command `repmtl-ray`: which command was meant, and the help that lists all.

Loads neither torch nor Ray.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

import repmtl_ray
from repmtl_ray import cli
from repmtl_ray.cli import commands
from repmtl_ray.cli.invocation import invocation


def main(words: Sequence[str] | None = None) -> None:
    """Runs `repmtl-ray`.

    Args:
        words: what was typed after it; None takes the process's.
    """
    if "_ARGCOMPLETE" in os.environ:
        complete()
    typed = list(sys.argv[1:] if words is None else words)
    if not typed or typed[0] in ("-h", "--help", "help"):
        print(help_text())
    elif typed[0] == "--version":
        print(f"repmtl_ray {repmtl_ray.__version__}")
    else:
        command, rest = split(typed)
        cli.main(command, rest)


def split(typed: Sequence[str]) -> tuple[str, list[str]]:
    """The command, which is one word or two, and the words after it."""
    for length in (2, 1):
        name = " ".join(typed[:length])
        if name in commands.COMMANDS:
            return name, list(typed[length:])
    second = [
        name.partition(" ")[2] for name in commands.COMMANDS if name.startswith(f"{typed[0]} ")
    ]
    near = difflib.get_close_matches(typed[0], commands.COMMANDS, n=1)
    if second:
        seen = repr(typed[1]) if len(typed) > 1 else "nothing"
        problem = f"after {typed[0]!r} stands {seen}; expected one of {', '.join(second)}"
    elif near:
        problem = f"there is no command {typed[0]!r}; did you mean {near[0]!r}?"
    else:
        problem = f"there is no command {typed[0]!r}; --help lists the commands"
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def help_text() -> str:
    """All commands in their groups, on one screen of 24 lines."""
    start = invocation("").strip()
    width = max(map(len, commands.COMMANDS))
    lines = [f"usage: {start} COMMAND OPTIONS; COMMAND --help explains it; --version"]
    for group, named in commands.GROUPS.items():
        lines.append(group)
        lines += [f"  {name:{width}}  {line}" for name, line in named.items()]
    return "\n".join(lines)


def complete() -> None:
    """Answers a shell that asks which words may follow, where argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    from repmtl_ray.cli.options import new_parser

    parser = new_parser(None, prog="repmtl-ray")
    parser.add_argument("--version", action="store_true")
    first = parser.add_subparsers()
    second = {}
    for name in commands.COMMANDS:
        head, _, tail = name.partition(" ")
        if tail and head not in second:
            second[head] = first.add_parser(head).add_subparsers()
        child = second[head].add_parser(tail) if tail else first.add_parser(name)
        commands.module(name).add_options(child)
    argcomplete.autocomplete(parser)
