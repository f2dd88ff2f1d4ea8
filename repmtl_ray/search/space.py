"""Search spaces before they are searched: their paths, and whether every trial could be done.

Owns the checks of a `param_space` against `Experiment`. Looks at Ray Tune's domains, starts
nothing.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Function, Integer, Sampler

from repmtl_ray.config import Experiment, nearest, replace
from repmtl_ray.policy_names import OwnPolicy, name_of, stands_for_policy

if TYPE_CHECKING:
    from repmtl_ray.tasks import Task


COLUMNS = {
    "policy": "policy.name",
    "log_losses": "policy.log_losses",
    "lambda_tsr": "regularizer.lambda_tsr",
    "lambda_csa": "regularizer.lambda_csa",
    "tau": "regularizer.temperature",
    "share": "regularizer.share",
    "learning_rate": "optimizer.learning_rate",
}
"""Columns of a search's table, and the values of the experiment that they show."""


def other_settings(values: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """In what a configuration differs that `COLUMNS` do not show, but for its seed: "batch_size 8".

    Args:
        values: of the configuration, by dotted path.
        usual: those of the experiment that is searched.
    """
    shown = {"seed", *COLUMNS.values()}
    return ", ".join(
        f"{path} {value}"
        for path, value in sorted(values.items())
        if path not in shown and (path not in usual or usual[path] != value)
    )


def flatten(
    values: Mapping[str, Any], prefix: str = "", *, whole: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """A nested mapping as one of dotted paths; `grid_search` lists stay values.

    Args:
        values: nested or flat.
        prefix: before every path.
        whole: paths whose mappings stay values (`whole_paths`).
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        is_part = isinstance(value, Mapping) and set(value) != {"grid_search"}
        if is_part and path not in whole:
            flat.update(flatten(value, f"{path}.", whole=whole))
        else:
            flat[path] = value
    return flat


def with_names(values: Any) -> Any:
    """A space, or a part of it, in which classes and instances of the user's own policies are names.

    Args:
        values: mappings, lists, choices and grids, or a value.

    Raises:
        ValueError: a class that no policy can be made of.
    """
    if stands_for_policy(values):
        return name_of(values)
    if isinstance(values, Mapping):
        return {key: with_names(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(with_names(value) for value in values)
    if isinstance(values, Categorical):
        named = copy.copy(values)
        named.categories = with_names(list(values.categories))
        return named
    return values


def own_names(values: Any) -> list[str]:
    """The names of the user's own policies in what `with_names` gave."""
    if isinstance(values, Categorical):
        values = values.categories
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return [name for value in values for name in own_names(value)]
    return [values] if isinstance(values, OwnPolicy) else []


def whole_paths(param_space: Mapping[str, Any]) -> frozenset[str]:
    """The paths that are chosen as a whole, such as `tune.choice([{"name": "CAGrad", ...}])`."""
    return frozenset(
        path
        for path, domain in flatten(param_space).items()
        if any(isinstance(value, Mapping) for value in choices_of(domain))
    )


def choices_of(domain: Any) -> list[Any]:
    """The values of a grid or a choice; none of a range."""
    if isinstance(domain, Mapping):
        return list(domain["grid_search"])
    return list(domain.categories) if isinstance(domain, Categorical) else []


def complete(
    reference: Mapping[str, Any], param_space: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """A reference with the keys that it leaves out drawn from the space; some searchers need all."""
    random_state = np.random.RandomState(seed)
    drawn = {
        path: domain.sample(random_state=random_state)
        for path, domain in flatten(param_space).items()
        if isinstance(domain, Domain)
    }
    return drawn | dict(reference)


def check_space(
    experiment: Experiment,
    param_space: Mapping[str, Any],
    searcher: str,
    known: tuple[Task, ...] | None = None,
) -> None:
    """Tries every value of every discrete choice, and the ends of ranges, before a trial does;
    `known` as in `selected_tasks`.

    A value must do either alone, or together with the first values of all other paths (a policy
    with its arguments).

    Raises:
        ValueError: a path that names no field, a value that its field or the policy refuses, a grid
            under Optuna, nothing to choose from.
    """
    space = flatten(param_space)
    values = {path: _candidates(path, domain, searcher) for path, domain in space.items()}
    first = {path: candidates[0] for path, candidates in values.items() if candidates}
    for path, candidates in values.items():
        for candidate in candidates:
            problem = problem_of(experiment, {path: candidate}, known)
            if problem and problem_of(experiment, first | {path: candidate}, known):
                raise ValueError(f"search space: {path!r} may become {candidate!r}: {problem}")


def _candidates(path: str, domain: Any, searcher: str) -> list[Any]:
    if isinstance(domain, Mapping):
        if searcher != "random":
            raise ValueError(
                f"search space: {path!r} is a grid, which searcher {searcher!r} cannot search; use 'random'."
            )
        found = list(domain["grid_search"])
    elif isinstance(domain, Categorical):
        found = list(domain.categories)
    elif isinstance(domain, Integer):
        return [domain.lower, domain.upper - 1]
    elif isinstance(domain, Domain):
        return [getattr(domain, end) for end in ("lower", "upper") if hasattr(domain, end)]
    else:
        return [domain]
    if not found:
        raise ValueError(f"search space: {path!r} has no values to choose from.")
    return found


def problem_of(
    experiment: Experiment, values: Mapping[str, Any], known: tuple[Task, ...] | None = None
) -> str:
    """Why an experiment with these values, by path, cannot be done; empty if it can. `known` as in
    `selected_tasks`."""
    from repmtl_ray.runs import loop

    try:
        loop.selected_tasks(replace(experiment, values), known)
    except ValueError as error:
        return str(error)
    return ""


def check_references(
    param_space: Mapping[str, Any], references: Sequence[Mapping[str, Any]]
) -> None:
    """Finds references that a search space does not hold, before a searcher chokes on them.

    Raises:
        ValueError: a path that is not searched, or a value that it cannot have.
    """
    space = flatten(param_space)
    for reference in references:
        for path, value in flatten(reference).items():
            if path not in space:
                raise ValueError(
                    f"references: {path!r} is not in the search space; {nearest(path, space)}"
                )
            if not has_value(space[path], value):
                raise ValueError(f"references: {path!r} cannot become {value!r} in the space.")


def check_rows(
    experiment: Experiment,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    known: tuple[Task, ...] | None = None,
) -> None:
    """Finds rows that are no experiments before anything is trained; `known` as in
    `selected_tasks`.

    Raises:
        ValueError: names the row.
    """
    for name, configurations in rows.items():
        for changes in configurations:
            problem = problem_of(experiment, changes, known)
            if problem:
                raise ValueError(f"rows: {name!r}: {problem}")


def has_value(domain: Any, value: Any) -> bool:
    """Whether a value of a search space (a domain, a grid, a plain value) may become `value`."""
    if isinstance(domain, Mapping):
        return value in domain["grid_search"]
    return bool(domain.is_valid(value)) if isinstance(domain, Domain) else domain == value


def described(value: Any) -> Any:
    """A search space, or a part of it, as plain values that can be stored and compared."""
    if isinstance(value, Function):
        code = value.func.__code__
        content = repr((code.co_code, code.co_consts, code.co_names))
        return {"function": f"{code.co_name} {hashlib.sha256(content.encode()).hexdigest()[:12]}"}
    if isinstance(value, Domain | Sampler):
        parts = {name.lstrip("_"): part for name, part in sorted(vars(value).items())}
        return {"domain": type(value).__name__, **described(parts)}
    if isinstance(value, Mapping):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def check_choice(name: str, found: str, expected: Sequence[str]) -> None:
    """Refuses an option that is none of those expected."""
    if found not in expected:
        raise ValueError(f"{name} is {found!r}; expected {' or '.join(map(repr, expected))}.")


def check_objective(objective: str, searcher: str, num_tasks: int) -> None:
    """Whether there is something that an objective could change.

    Raises:
        ValueError: another name; "tasks" where nothing learns from it, or with one task.
    """
    check_choice("objective", objective, ("delta_p", "tasks"))
    if objective == "delta_p":
        return
    if searcher != "optuna":
        raise ValueError(
            f"objective is 'tasks', but searcher {searcher!r} learns from no objective; take searcher 'optuna'."
        )
    if num_tasks < 2:
        raise ValueError(
            "objective is 'tasks', but the experiment trains one task; take 'delta_p'."
        )


def check_numbers(num_samples: int, num_references: int, max_concurrent: int | None) -> None:
    """
    Raises:
        ValueError: fewer samples than references, or none at once.
    """
    if num_samples < max(1, num_references):
        raise ValueError(
            f"num_samples is {num_samples}; expected at least 1, and at least the {num_references} references."
        )
    if max_concurrent is not None and max_concurrent < 1:
        raise ValueError(f"max_concurrent is {max_concurrent}; expected at least 1.")
