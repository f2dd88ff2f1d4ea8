"""What all recipes in `pipelines/` share: how they end, and where they write.

Owns the exit codes. The options are in `options.py`; what searches and benchmarks have in common is in
`search.py` and `benchmark.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from repmtl_ray import storage
from repmtl_ray.cli import interruption
from repmtl_ray.config import Experiment, from_dict


def main(run: Callable[[], object]) -> None:
    """Runs a recipe; a user's mistake ends it with one line and exit code 2, an interruption with
    the command that continues it and exit code 130."""
    try:
        with interruption.handled():
            run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def folder(out: str) -> Path:
    """The folder of `--out`, made and found writable before a search, not after hours of it.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    made = Path(out)
    try:
        storage.check_writable(storage.absolute(out))
        made.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {out!r} cannot be used: {error}") from error
    return made


def read_experiment(path: Path) -> Experiment:
    """The experiment of a JSON file, as a search leaves it (best.json).

    Raises:
        ValueError: no such file, or it holds something else.
    """
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
