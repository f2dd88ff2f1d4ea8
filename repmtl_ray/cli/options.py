"""The command-line options that commands share, and what they mean.

Every group of options is added by one function and read by another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from repmtl_ray import storage
from repmtl_ray.config import ModelConfig
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig

if TYPE_CHECKING:
    from repmtl_ray.placement import Placement


SCHEDULERS = ("none", "asha", "hyperband", "pbt")
"""Those of `search/schedulers.py`, whose package loads Ray."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as every other mistake of a user is."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        print(f"error: {' '.join(message.split())}; --help lists the options.", file=sys.stderr)
        raise SystemExit(2)


def new_parser(description: str | None, prog: str | None = None) -> Parser:
    """A parser that shows a command's docstring as it is written, with the option that all have."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug", action="store_true", help="show where in the code an error was raised"
    )
    return parser


def add_training_options(group: argparse._ActionsContainer) -> None:
    """What decides how a run trains, over the preset; read by `training_changes`."""
    group.add_argument("--epochs", type=int, help="default: the preset's")
    group.add_argument(
        "--batch-size", type=int, help="samples per step over all workers (default: the preset's)"
    )
    group.add_argument("--encoder", help="a timm model name (default: the preset's)")
    group.add_argument("--weights", help="local file with the encoder's weights")
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        help="the encoder's published weights from the hub (default: the preset's)",
    )
    add_set_option(group)


def add_set_option(group: argparse._ActionsContainer) -> None:
    """`--set PATH=VALUE`, any number of times; read by `assignments`."""
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change any value of the experiment (JSON, or a string)",
    )


def training_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the training options change, as `config.replace` takes it; without `--set`."""
    changes = {
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "model.encoder": arguments.encoder,
        "model.pretrained": False if arguments.weights else arguments.pretrained,
        "model.weights": arguments.weights,
    }
    if arguments.weights and arguments.pretrained:
        raise ValueError("--weights and --pretrained: give one of the two.")
    return {path: value for path, value in changes.items() if value is not None}


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """What `--set` was given, as `config.replace` takes it.

    Another head or other features leave out parts that a preset may have set; those return to their
    defaults.

    Raises:
        ValueError: a text without "=".
    """
    changes: dict[str, Any] = {}
    for text in texts:
        path, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set {text!r}: expected PATH=VALUE, for example epochs=50.")
        try:
            changes[path] = json.loads(value)
        except json.JSONDecodeError:
            changes[path] = value
    usual = ModelConfig()
    if changes.get("model.head", "aspp") != "aspp":
        changes.setdefault("model.head_channels", usual.head_channels)
        changes.setdefault("model.atrous_rates", usual.atrous_rates)
    if changes.get("model.features", "map") != "map":
        changes.setdefault("model.output_stride", None)
    return changes


MAX_SEEDS = 1000


def checked_seeds(number: int) -> range:
    """The seeds that `--seeds` asks for, from 0 on.

    Raises:
        ValueError: fewer than one, or more than anybody means.
    """
    if not 1 <= number <= MAX_SEEDS:
        raise ValueError(f"--seeds is {number}; expected 1 to {MAX_SEEDS}.")
    return range(number)


def add_placement_options(parser: argparse.ArgumentParser, unit: str) -> argparse._ArgumentGroup:
    """Where runs go (read by `placement_of`) and when they are saved (read by `checkpoints_of`).

    Args:
        parser: of the command.
        unit: what a run is called: "run" or "trial".

    Returns:
        The group that holds them.
    """
    where = parser.add_argument_group("where it runs (no result depends on it)")
    where.add_argument(
        "--workers",
        type=num_workers,
        default=1,
        metavar="N or LEAST:MOST",
        help=f"data-parallel processes per {unit} (default: %(default)s)",
    )
    where.add_argument("--cpus-per-worker", type=float, default=1, help="default: %(default)s")
    where.add_argument("--gpus-per-worker", type=float, default=0, help="default: %(default)s")
    where.add_argument(
        "--data-actors",
        choices=("auto", "ray", "worker"),
        default="auto",
        help="who reads and augments: data actors on free CPUs of any node (ray), the workers' own threads (worker), or "
        "actors where they can pay (default: %(default)s)",
    )
    where.add_argument(
        "--data-cpus",
        type=int,
        metavar="N",
        help="data actors per worker, with one CPU each (default: the CPUs that are free, at most 4)",
    )
    where.add_argument(
        "--storage", help=f"folder or URI that all nodes share (default: {storage.DEFAULT_STORAGE})"
    )
    where.add_argument(
        "--save-every-steps",
        type=int,
        metavar="N",
        help="save also inside an epoch, after so many steps (default: do not)",
    )
    where.add_argument(
        "--save-every-minutes",
        type=float,
        metavar="M",
        default=CheckpointConfig.every_minutes,
        help="save also inside an epoch, after so many minutes; 0 does not (default: %(default)s)",
    )
    return where


def add_study_options(parser: argparse.ArgumentParser, kind: str, unit: str) -> None:
    """Placement, name, resume and results of a search or a benchmark; read by `study_options`."""
    where = add_placement_options(parser, unit)
    where.add_argument(
        "--max-concurrent",
        type=int,
        help=f"{unit}s at once (default: what the cluster has room for)",
    )
    add_log_options(where)
    where.add_argument("--name", help=f"of the {kind} (default: a new one)")
    where.add_argument(
        "--resume",
        metavar="NAME",
        help=f"continue the {kind} of this name; finished {unit}s do not run again",
    )
    where.add_argument(
        "--out", default="results", help="folder for tables and report (default: %(default)s)"
    )


def study_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `tune` and `benchmark` take of those options.

    Raises:
        ValueError: another name than that of the study to resume.
    """
    if arguments.resume is not None and arguments.name not in (None, arguments.resume):
        raise ValueError(
            f"--name {arguments.name} and --resume {arguments.resume}: give the name that is resumed alone."
        )
    return {
        "placement": placement_of(arguments),
        "max_concurrent": arguments.max_concurrent,
        "storage": arguments.storage,
        "name": arguments.name if arguments.resume is None else arguments.resume,
        "resume": arguments.resume is not None,
        "checkpoints": checkpoints_of(arguments),
        **log_of(arguments),
    }


def add_log_options(parser: argparse._ActionsContainer) -> None:
    """Where the numbers of a run are written too; read by `log_of`."""
    parser.add_argument(
        "--log",
        nargs="+",
        default=[],
        metavar="NAME",
        help="write every run's numbers for csv, tensorboard, mlflow or wandb (default: none)",
    )
    parser.add_argument(
        "--log-every",
        type=int,
        default=10,
        metavar="N",
        help="steps between two that are logged; 0 logs epochs alone (default: %(default)s)",
    )
    parser.add_argument(
        "--log-images",
        type=int,
        default=0,
        metavar="N",
        help="evaluation images whose predictions are logged as pictures after every epoch (default: %(default)s)",
    )


def log_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `fit` takes of the options of a log."""
    return {
        "log": arguments.log,
        "log_every": arguments.log_every,
        "log_images": arguments.log_images,
    }


def placement_of(arguments: argparse.Namespace) -> Placement:
    """What the placement options say."""
    from repmtl_ray.placement import Placement

    return Placement(
        num_workers=arguments.workers,
        cpus_per_worker=arguments.cpus_per_worker,
        gpus_per_worker=arguments.gpus_per_worker,
        data=arguments.data_actors,
        data_cpus=arguments.data_cpus,
    )


def checkpoints_of(arguments: argparse.Namespace) -> CheckpointConfig:
    """When the options save a run inside an epoch."""
    minutes = arguments.save_every_minutes
    return CheckpointConfig(
        every_steps=arguments.save_every_steps, every_minutes=None if minutes == 0 else minutes
    )


def num_workers(text: str) -> int | tuple[int, int]:
    """The value of --workers; a range is LEAST:MOST."""
    least, colon, most = text.partition(":")
    try:
        return (int(least), int(most)) if colon else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected N or LEAST:MOST") from None


def number_from_0(text: str) -> int:
    """The value of an option that counts, and may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 0")
    return int(text)
