"""The command line: how a command starts and ends, and where it writes.

Owns the exit codes. One command is one module of `commands/`; the console command `repmtl-ray` is in
`console.py`; the options that commands share are in `options.py`, `search.py` and `comparison.py`. No
module here loads torch or Ray before a command runs, so that its help comes at once.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repmtl_ray import extras

if TYPE_CHECKING:
    from repmtl_ray.cli.options import Parser
    from repmtl_ray.config import Experiment


def main(command: str, words: Sequence[str] | None = None) -> None:
    """Runs one command to its end.

    Args:
        command: as `commands.COMMANDS` names it, for example "tune cityscapes".
        words: its options; None takes those of the process.
    """
    from repmtl_ray.cli import commands

    try:
        extras.require_extras(f"the command {command!r}", *commands.extras_of(command))
    except extras.MissingLibraryError as error:
        raise _mistake(error) from error
    arguments = parser_of(command).parse_args(words)
    run = functools.partial(commands.module(command).run, arguments)
    run_to_end(run, debug=arguments.debug)


def parser_of(command: str) -> Parser:
    """The options of a command, with its module's docstring as the description."""
    from repmtl_ray.cli import commands
    from repmtl_ray.cli.invocation import invocation, spoken
    from repmtl_ray.cli.options import new_parser

    module = commands.module(command)
    parser = new_parser(spoken(module.__doc__ or "", *commands.COMMANDS), prog=invocation(command))
    module.add_options(parser)
    return parser


def run_to_end(run: Callable[[], object], *, debug: bool = False) -> None:
    """Calls a function; a user's mistake ends the process with one line and exit code 2, an
    interruption with the command that continues it and exit code 130.

    Args:
        run: the command.
        debug: print the trace of a mistake, too.
    """
    from repmtl_ray.cli import interruption

    try:
        with interruption.handled():
            run()
    except ValueError as error:
        if debug:
            traceback.print_exc()
        raise _mistake(error) from error


def _mistake(error: ValueError) -> SystemExit:
    """Prints a user's mistake; the way to end the process."""
    print(f"error: {error}", file=sys.stderr)
    return SystemExit(2)


def folder(out: str, option: str = "--out") -> Path:
    """The folder of an option, made and found writable before a search, not after hours of it.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    from repmtl_ray import storage

    made = Path(out)
    try:
        storage.check_writable(storage.absolute(out))
        made.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {out!r} cannot be used: {error}") from error
    return made


def read_experiment(path: Path) -> Experiment:
    """The experiment of a JSON file, as a search leaves it (best.json).

    Raises:
        ValueError: no such file, or it holds something else.
    """
    from repmtl_ray import storage
    from repmtl_ray.config import Experiment, from_dict

    with storage.explained(str(path)):
        is_file = path.is_file()
    if not is_file:
        raise ValueError(f"{path} is not a file; give the best.json of a search.")
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not the fields of an experiment")
        return from_dict(Experiment, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} describes no experiment: {error}") from error


def device(name: str) -> str:
    """A device's name, if this machine has it.

    Raises:
        ValueError: it has not.
    """
    import torch

    if name != "cpu" and not (name.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {name}: this machine has no such device; take cpu.")
    return name
