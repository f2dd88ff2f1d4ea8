"""The command line of a search: its options, the space and the references, and the search itself.

Owns what the commands `tune cityscapes` and `tune office31` share; the commands own their data sets'
experiments.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from repmtl_ray import cli
from repmtl_ray.cli.options import (
    SCHEDULERS,
    add_study_options,
    add_training_options,
    assignments,
    study_options,
    training_changes,
)
from repmtl_ray.config import Experiment, replace

if TYPE_CHECKING:
    from repmtl_ray.search import SearchResult

EW_PLAIN = {
    "policy.name": "EW",
    "policy.log_losses": False,
    "regularizer.lambda_tsr": 0.0,
    "regularizer.lambda_csa": 0.0,
}
EW_LOG = {**EW_PLAIN, "policy.log_losses": True}
ROWS: dict[str, dict[str, Any]] = {
    "EW": EW_PLAIN,
    "EW-log": EW_LOG,
    **{
        f"scalarisation {weights[0]:g} : {weights[1]:g}": {
            **EW_LOG,
            "policy.name": "Constant",
            "policy.arguments": {"weights": weights},
        }
        for weights in ([0.5, 1.5], [1.5, 0.5])
    },
    "Rep-MTL as printed": {
        "policy.name": "EW",
        "policy.log_losses": True,
        "regularizer.lambda_tsr": 0.9,
        "regularizer.lambda_csa": 0.9,
    },
}
"""Of two tasks: what the demonstration is held against. With EW-log, whose weights are 1 : 1, the two
scalarisations are a search over constant weights with three candidates."""
REFERENCES = (EW_PLAIN, EW_LOG)
"""Tried first by every search whose space has these values: what the logarithm gives is not the
penalties' merit."""


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """The options that every search has; read by `run_search`."""
    what = parser.add_argument_group("what is searched")
    what.add_argument(
        "--samples",
        type=int,
        help="trials in all; for grids, how often the grid is run (default: the preset's; a grid once)",
    )
    what.add_argument(
        "--space",
        help="a function of search_spaces (bounded, mid_run, scalarisation, small, joint, policies, paper_grid, "
        "sensitivity) or package.module:function (default: the preset's; mid_run with pbt)",
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
        choices=SCHEDULERS,
        default="none",
        help="asha stops weak trials early, hyperband in brackets; pbt: weak trials go on with the weights of strong "
        "ones and changed coefficients (default: %(default)s)",
    )
    what.add_argument(
        "--objective",
        choices=("delta_p", "tasks"),
        default="delta_p",
        help="tasks: with optuna, the Pareto front of the tasks' gains (default: %(default)s)",
    )
    what.add_argument(
        "--no-references",
        action="store_true",
        help="do not try plain EW and EW on log losses first",
    )
    training = parser.add_argument_group("how a trial trains")
    training.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_training_options(training)
    add_study_options(parser, "search", "trial")


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that change the preset's experiment, as `config.replace` takes them."""
    return {"seed": arguments.seed, **training_changes(arguments)}


def run_search(
    experiment: Experiment,
    arguments: argparse.Namespace,
    *,
    space: str,
    samples: int,
    metrics: Sequence[str],
    data_title: str,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    num_seeds: int = 1,
) -> SearchResult:
    """Searches, prints the table, and writes the results.

    Args:
        experiment: with the command's options applied; `--set` is, here, as the last word.
        arguments: of `add_search_options`.
        space, samples: the preset's, where the options say nothing; a grid is run once.
        metrics: columns of the table.
        data_title: names the data in table and figure.
        rows: trained besides the draws, by name; each with every seed.
        num_seeds: of every row, and of every point of a grid; from the experiment's on.
    """
    from repmtl_ray.cli.results import write_results
    from repmtl_ray.search import tune

    experiment = replace(experiment, assignments(arguments.set))
    if arguments.scheduler == "pbt":
        space = "mid_run"  # the presets' spaces choose policies or seeds, which no run can change
    param_space = search_space(arguments.space or space, arguments.policies, experiment)
    num_samples = _num_samples(arguments.samples, samples, param_space)
    references = [] if arguments.no_references or rows else references_for(param_space)
    seeds = list(range(experiment.seed, experiment.seed + num_seeds))
    is_grid = any(isinstance(domain, Mapping) for domain in param_space.values())
    if num_seeds > 1 and is_grid:  # what is drawn would be drawn anew for every seed
        param_space["seed"] = {"grid_search": seeds}
    named = {} if arguments.no_references or rows is None else rows
    out = cli.folder(arguments.out)
    result = tune(
        experiment,
        param_space,
        num_samples=num_samples,
        searcher=arguments.searcher,
        scheduler=arguments.scheduler,
        objective=arguments.objective,
        references=references,
        rows={name: [{**row, "seed": seed} for seed in seeds] for name, row in named.items()},
        **study_options(arguments),
    )
    write_results(result, out, metrics=metrics, title=data_title)
    return result


def _num_samples(chosen: int | None, preset: int, param_space: Mapping[str, Any]) -> int:
    """A preset says how many points are drawn from ranges; it does not multiply a grid."""
    from repmtl_ray.search.space import flatten

    if chosen is not None:
        return chosen
    return (
        1
        if any(isinstance(domain, Mapping) for domain in flatten(param_space).values())
        else preset
    )


def search_space(
    name: str, policies: Sequence[str] | None, experiment: Experiment | None = None
) -> dict[str, Any]:
    """Calls a space function by name, with the experiment's number of tasks if it asks for it.

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
    parameters = inspect.signature(function).parameters
    names = parameters.get("names")
    if policies is not None:
        if names is None:
            raise ValueError(
                f"--policies: the space {name!r} takes no policy names; use 'small', 'joint' or 'policies'."
            )
        return function(tuple(policies))
    if names is not None and names.default is names.empty:
        raise ValueError(f"--space {name!r} needs policies to search over; add --policies NAME ...")
    if "num_tasks" in parameters and experiment is not None:
        from repmtl_ray.runs.build import selected_tasks

        return function(num_tasks=len(selected_tasks(experiment)))
    return function()


def references_for(param_space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference points of a space: EW without penalties, on plain losses and on their
    logarithms.

    A space that is a grid, or that has not all their values, has none.
    """
    from repmtl_ray.search.space import flatten, has_value

    space = flatten(param_space)
    if any(isinstance(domain, Mapping) for domain in space.values()):
        return []
    return [
        dict(reference)
        for reference in REFERENCES
        if all(path in space and has_value(space[path], reference[path]) for path in reference)
    ]
