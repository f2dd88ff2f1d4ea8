"""What population based training may change while a run trains, and what it cannot be used with.

Owns the checks before anything starts. The scheduler is in `pbt.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.search.sample import Domain, Float

from repmtl_ray.config import Experiment, replace
from repmtl_ray.search.space import choices_of, flatten
from repmtl_ray.search.study import num_tasks, trains_in_process

if TYPE_CHECKING:
    from repmtl_ray.placement import Placement
    from repmtl_ray.tasks import Task

MAY_CHANGE = (
    *("regularizer.lambda_tsr", "regularizer.lambda_csa"),
    *("regularizer.temperature", "regularizer.share"),
    *("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.momentum"),
    "optimizer.max_gradient_norm",
)
"""What changes neither the network nor what a checkpoint holds, besides numbers among the arguments
of the policy."""
_ARGUMENTS = "policy.arguments."


def mutations(experiment: Experiment, param_space: Mapping[str, Any], tasks: int) -> dict[str, Any]:
    """What a population changes, as Ray Tune's scheduler takes it: lists and ranges by dotted path.

    Args:
        experiment: that is searched.
        param_space: as for `tune`; its plain values stay as they are.
        tasks: how many the experiment has.

    Raises:
        ValueError: a path that cannot change in mid-run, or nothing to change.
    """
    space = flatten(param_space)
    varied = {p: v for p, v in space.items() if isinstance(v, Domain | Mapping)}
    for path in varied:
        if path not in MAY_CHANGE and not path.startswith(_ARGUMENTS):
            raise _refusal(
                path,
                "runs take each other's weights over, so that none would be of one seed"
                if path == "seed"
                else "the network, its data, the policy or the losses would be others",
            )
    found = {path: _values(path, domain) for path, domain in varied.items()}
    first = {path: _ends(values)[0] for path, values in found.items()}
    for path, values in found.items():
        if path.startswith(_ARGUMENTS):
            _check_argument(experiment, space | first, path, _ends(values), tasks)
    if not found:
        raise ValueError(
            "scheduler 'pbt' has nothing to change: the search space has plain values alone. It can "
            f"change {', '.join(MAY_CHANGE)} and numbers in policy.arguments."
        )
    return found


def _values(path: str, domain: Any) -> Any:
    """A list, ordered where it is of numbers, or a range of floats."""
    choices = choices_of(domain)
    if choices:
        is_ordered = all(type(choice) in (int, float) for choice in choices)
        return sorted(choices) if is_ordered else choices
    if isinstance(domain, Float):
        return domain
    raise ValueError(
        f"scheduler 'pbt' cannot change {path!r}, which the space draws by {type(domain).__name__}; it "
        "changes values of a choice, of a grid, or of a range of floats."
    )


def _ends(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values.lower, values.upper]


def _check_argument(
    experiment: Experiment, first: Mapping[str, Any], path: str, ends: Sequence[Any], tasks: int
) -> None:
    """Refuses an argument of the policy that decides what the policy remembers.

    Args:
        experiment, tasks: as for `mutations`.
        first: a point of the space.
        path: of the argument.
        ends: values of it.
    """
    from repmtl_ray import policies
    from repmtl_ray.policies.arguments import Number, arguments_of

    policy = policies.class_of(replace(experiment, first).policy.name)
    argument = arguments_of(policy).get(path.removeprefix(_ARGUMENTS))
    if argument is None or not isinstance(argument.rule, Number):
        raise _refusal(
            path, "of the policy's arguments, only single numbers that are no counts can change"
        )
    names = [f"task {number}" for number in range(tasks)]
    made = [replace(experiment, {**first, path: end}).policy for end in ends]
    remembered = {tuple(policies.build(policy, names).state_dict()) for policy in made}
    if len(remembered) > 1:
        raise _refusal(path, "with some of its values the policy remembers more than with others")


def _refusal(path: str, reason: str) -> ValueError:
    return ValueError(
        f"scheduler 'pbt' cannot change {path!r} in mid-run: {reason}. Give it one plain value, or take "
        "another scheduler."
    )


def check_population(
    experiment: Experiment,
    param_space: Mapping[str, Any],
    num_samples: int,
    known: tuple[Task, ...] | None = None,
    *,
    searcher: str,
    placement: Placement,
    max_concurrent: int | None,
) -> None:
    """Finds what population based training cannot be done with; arguments as for `tune`.

    Raises:
        ValueError: names it.
    """
    workers, epochs = placement.num_workers, experiment.epochs
    grids = [v for v in flatten(param_space).values() if isinstance(v, Mapping)]
    size = num_samples * math.prod(len(choices_of(grid)) for grid in grids)
    for problem, found in (
        (searcher != "random", f"searcher {searcher!r}, which chooses values too; take 'random'"),
        (size < 2, f"num_samples {num_samples}; a population has at least 2 runs"),
        (epochs < 2, f"epochs {epochs}; a run needs at least 2 to change in between"),
        (
            not trains_in_process(placement),
            f"{workers} workers a trial; it pauses trials, which those of one worker alone can do",
        ),
        (
            max_concurrent is not None and max_concurrent < size,
            f"max_concurrent {max_concurrent}; all {size} runs take turns on what the nodes have "
            "room for. Leave it out; a larger cpus_per_worker leaves room for fewer at once",
        ),
    ):
        if problem:
            raise ValueError(f"scheduler 'pbt' cannot be used with {found}.")
    mutations(experiment, param_space, num_tasks(experiment, known))
