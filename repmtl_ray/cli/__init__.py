"""What the recipes in `pipelines/` share: options, and what a search prints and leaves behind.

Owns the command line of a search; the recipes own their data sets' experiments.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repmtl_ray import storage
from repmtl_ray.cli import interruption
from repmtl_ray.cli.results import write_results
from repmtl_ray.cluster import Placement
from repmtl_ray.config import Experiment, from_dict, replace
from repmtl_ray.runs.keeper import Checkpoints
from repmtl_ray.search import SearchResult, tune
from repmtl_ray.search.space import flatten, has_value

EW_PLAIN = {
    "policy.name": "EW",
    "policy.log_losses": False,
    "regularizer.lambda_tsr": 0.0,
    "regularizer.lambda_csa": 0.0,
}
EW_LOG = {**EW_PLAIN, "policy.log_losses": True}
REFERENCES = (EW_PLAIN, EW_LOG)
"""Tried first by every search whose space has these values: what the logarithm gives is not the
penalties' merit."""


def search_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every search recipe has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is searched")
    what.add_argument(
        "--samples",
        type=int,
        help="trials in all; for grids, how often the grid is run (default: the preset's; a grid once)",
    )
    what.add_argument(
        "--space",
        help="a function of search_spaces (small, joint, policies, paper_grid, sensitivity) "
        "or package.module:function (default: the preset's)",
    )
    what.add_argument(
        "--policies",
        nargs="+",
        metavar="NAME",
        help="policies to search over, if the space takes names",
    )
    what.add_argument(
        "--searcher", choices=("random", "optuna"), default="random", help="default: %(default)s"
    )
    what.add_argument(
        "--scheduler",
        choices=("none", "asha"),
        default="none",
        help="asha stops weak trials early (default: %(default)s)",
    )
    what.add_argument(
        "--no-references",
        action="store_true",
        help="do not try plain EW and EW on log losses first",
    )
    training = parser.add_argument_group("how a trial trains")
    training.add_argument("--epochs", type=int, help="default: the preset's")
    training.add_argument(
        "--batch-size", type=int, help="samples a step over all workers (default: the preset's)"
    )
    training.add_argument("--encoder", help="a timm model name (default: the preset's)")
    training.add_argument("--weights", help="local file with the encoder's weights")
    training.add_argument(
        "--pretrained", action="store_true", help="the encoder's published weights from the hub"
    )
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_set_option(training)
    where = add_placement_options(parser, "trial")
    add_checkpoint_options(where)
    where.add_argument("--name", help="of the search (default: a new one)")
    where.add_argument(
        "--resume",
        metavar="NAME",
        help="continue the search of this name; finished trials do not run again",
    )
    where.add_argument(
        "--out",
        default="results",
        help="folder for table, CSV, picture and best configuration (default: %(default)s)",
    )
    return parser


def add_set_option(parser: argparse._ActionsContainer) -> None:
    """`--set PATH=VALUE`, any number of times; read by `assignments`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change any value of the experiment (JSON, or a string)",
    )


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """What `--set` was given, as `config.replace` takes it.

    Raises:
        ValueError: a text without "=".
    """
    found: dict[str, Any] = {}
    for text in texts:
        path, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set {text!r}: expected PATH=VALUE, for example epochs=50.")
        try:
            found[path] = json.loads(value)
        except json.JSONDecodeError:
            found[path] = value
    return found


def add_placement_options(
    parser: argparse.ArgumentParser, unit: str, *, several: bool = True
) -> argparse._ArgumentGroup:
    """The options of where runs go (read by `placement_of`), and the group that holds them."""
    where = parser.add_argument_group("where it runs (no result depends on it)")
    where.add_argument(
        "--workers",
        type=num_workers,
        default=1,
        metavar="N or LEAST:MOST",
        help=f"data-parallel processes a {unit} (default: %(default)s)",
    )
    where.add_argument("--cpus-per-worker", type=float, default=1, help="default: %(default)s")
    where.add_argument("--gpus-per-worker", type=float, default=0, help="default: %(default)s")
    if several:
        where.add_argument(
            "--max-concurrent",
            type=int,
            help=f"{unit}s at once (default: what the cluster has room for)",
        )
    where.add_argument(
        "--storage", help=f"folder or URI that all nodes share (default: {storage.DEFAULT_STORAGE})"
    )
    return where


def placement_of(arguments: argparse.Namespace) -> Placement:
    """What those options say."""
    return Placement(
        num_workers=arguments.workers,
        cpus_per_worker=arguments.cpus_per_worker,
        gpus_per_worker=arguments.gpus_per_worker,
    )


def read_experiment(path: Path) -> Experiment:
    """The experiment of a JSON file, as a search leaves it (best.json).

    Raises:
        ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the best.json of a search.")
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not the fields of an experiment")
        return from_dict(Experiment, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} describes no experiment: {error}") from error


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that change the experiment, as `config.replace` takes them."""
    chosen: dict[str, Any] = {"seed": arguments.seed}
    for path, value in {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "model.encoder": arguments.encoder,
        "model.weights": arguments.weights,
    }.items():
        if value is not None:
            chosen[path] = value
    if arguments.pretrained:
        chosen["model.pretrained"] = True
    return chosen


def num_workers(text: str) -> int | tuple[int, int]:
    """The value of --workers; a range is LEAST:MOST."""
    least, colon, most = text.partition(":")
    return (int(least), int(most)) if colon else int(text)


def add_checkpoint_options(parser: argparse._ActionsContainer) -> None:
    """When a run is saved inside an epoch."""
    parser.add_argument(
        "--save-every-steps",
        type=int,
        metavar="N",
        help="save also inside an epoch, after so many steps (default: do not)",
    )
    parser.add_argument(
        "--save-every-minutes",
        type=float,
        metavar="M",
        default=Checkpoints.every_minutes,
        help="save also inside an epoch, after so many minutes; 0 does not (default: %(default)s)",
    )


def checkpoints_of(arguments: argparse.Namespace) -> Checkpoints:
    """What those options say."""
    minutes = arguments.save_every_minutes
    return Checkpoints(
        every_steps=arguments.save_every_steps, every_minutes=None if minutes == 0 else minutes
    )


def search_space(name: str, policies: Sequence[str] | None) -> dict[str, Any]:
    """Calls a space function by name.

    Raises:
        ValueError: no such function, policies for one that takes none, or none for one that needs
            them.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        module = importlib.import_module(module_name or "search_spaces")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--space {name!r}: {error}; expected package.module:function of an installed package, or of a folder in "
            "PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        known = getattr(module, "__all__", None) or [
            known
            for known, found in vars(module).items()
            if inspect.isfunction(found) and not known.startswith("_")
        ]
        raise ValueError(
            f"--space {name!r}: {module.__name__} has no function {function_name!r}; it has {', '.join(known) or 'none'}."
        )
    names = inspect.signature(function).parameters.get("names")
    if policies is not None:
        if names is None:
            raise ValueError(
                f"--policies: the space {name!r} takes no policy names; use 'small', 'joint' or 'policies'."
            )
        return function(tuple(policies))
    if names is not None and names.default is names.empty:
        raise ValueError(f"--space {name!r} needs policies to search over; add --policies NAME ...")
    return function()


def run_search(
    experiment: Experiment,
    arguments: argparse.Namespace,
    *,
    space: str,
    samples: int,
    metrics: Sequence[str],
    data_title: str,
) -> SearchResult:
    """Searches, prints the table, and writes the results.

    Args:
        experiment: with the recipe's options applied; `--set` is, here, as the last word.
        arguments: from `search_parser`.
        space, samples: the preset's, where the options say nothing; a grid is run once.
        metrics: columns of the table.
        data_title: names the data in table and figure.
    """
    param_space = search_space(arguments.space or space, arguments.policies)
    experiment = replace(experiment, assignments(arguments.set))
    out = folder(arguments.out)
    result = tune(
        experiment,
        param_space,
        num_samples=_num_samples(arguments.samples, samples, param_space),
        searcher=arguments.searcher,
        scheduler=arguments.scheduler,
        references=[] if arguments.no_references else references_for(param_space),
        placement=placement_of(arguments),
        max_concurrent=arguments.max_concurrent,
        storage_path=arguments.storage,
        name=arguments.resume or arguments.name,
        resume=arguments.resume is not None,
        checkpoints=checkpoints_of(arguments),
    )
    write_results(result, out, metrics=metrics, title=data_title)
    return result


def _num_samples(chosen: int | None, preset: int, param_space: Mapping[str, Any]) -> int:
    """A preset says how many points are drawn from ranges; it does not multiply a grid."""
    if chosen is not None:
        return chosen
    return (
        1
        if any(isinstance(domain, Mapping) for domain in flatten(param_space).values())
        else preset
    )


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


def references_for(param_space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference points of a space: EW without penalties, on plain losses and on their
    logarithms.

    A space that is a grid, or that has not all their values, has none.
    """
    space = flatten(param_space)
    if any(isinstance(domain, Mapping) for domain in space.values()):
        return []
    return [
        dict(reference)
        for reference in REFERENCES
        if all(path in space and has_value(space[path], reference[path]) for path in reference)
    ]


def main(run: Any) -> None:
    """Runs a recipe; a user's mistake ends it with one line and exit code 2, an interruption with
    the command that continues it and exit code 130."""
    try:
        with interruption.handled():
            run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
