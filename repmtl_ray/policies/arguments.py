"""The arguments a policy takes: defaults, what each may be, and messages for what it may not.

Owns the checks of `PolicyConfig.arguments`. Owns no policy; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REQUIRED = "required"


@dataclass(frozen=True)
class Argument:
    """One argument of a policy.

    Args:
        default: taken when the argument is not given; `REQUIRED` where there is none.
        expected: the end of the sentence "... is 3; expected ...".
        accept: (value, tasks) -> the value as the policy takes it; raises ValueError if it cannot.
    """

    default: Any
    expected: str
    accept: Callable[[Any, Sequence[str]], Any]


Signature = Mapping[str, Argument]


def number(
    default: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> Argument:
    """A finite number between bounds."""
    bounds = {">=": at_least, ">": above, "<=": at_most, "<": below}
    wanted = " and ".join(
        f"{sign} {bound:g}" for sign, bound in bounds.items() if abs(bound) < math.inf
    )

    def accept(value: Any, _tasks: Sequence[str]) -> float:
        found = _finite(value)
        _demand(at_least <= found <= at_most and above < found < below)
        return found

    return Argument(default, f"a finite number {wanted}".rstrip(), accept)


def integer(default: Any, *, at_least: int, at_most: float = math.inf) -> Argument:
    """A whole number; None is allowed where it is the default."""
    bounds = f">= {at_least}" + f" and <= {at_most}" * (at_most < math.inf)

    def accept(value: Any, _tasks: Sequence[str]) -> int | None:
        if value is None and default is None:
            return None
        _demand(type(value) is int and at_least <= value <= at_most)
        return int(value)

    return Argument(default, f"an integer {bounds}" + " or None" * (default is None), accept)


def choice(default: str, *others: str) -> Argument:
    """One of a few words, the default first."""

    def accept(value: Any, _tasks: Sequence[str]) -> str:
        _demand(value in (default, *others))
        return str(value)

    return Argument(default, "one of " + ", ".join(map(repr, (default, *others))), accept)


def task(default: None = None) -> Argument:
    """A task's name; None is the first task."""

    def accept(value: Any, tasks: Sequence[str]) -> str:
        _demand(value is None or value in tasks)
        return tasks[0] if value is None else str(value)

    return Argument(default, "a task's name, or None for the first", accept)


def per_task(
    default: Any, *, positive: bool = False, non_negative: bool = False, at_most: float = math.inf
) -> Argument:
    """One number a task: one for all, a list in the tasks' order, or a mapping by task name."""
    bounds = [" > 0"] * positive + [" >= 0, not all 0"] * non_negative
    bounds += [f" <= {at_most:g}"] * (at_most < math.inf)

    def accept(value: Any, tasks: Sequence[str]) -> tuple[float, ...]:
        if isinstance(value, Mapping):
            _demand(set(value) == set(tasks))
            value = [value[name] for name in tasks]
        elif not isinstance(value, (list, tuple)):
            value = [value] * len(tasks)
        _demand(len(value) == len(tasks))
        found = tuple(_finite(part) for part in value)
        _demand(all(part <= at_most for part in found))
        _demand(not positive or all(part > 0 for part in found))
        _demand(not non_negative or (all(part >= 0 for part in found) and any(found)))
        return found

    expected = "one finite number a task (a list in the tasks' order or a mapping by task)"
    return Argument(default, expected + ",".join(bounds), accept)


def resolve(
    policy: str, given: Mapping[str, Any], signature: Signature, tasks: Sequence[str]
) -> dict[str, Any]:
    """Every argument of a policy, defaults filled in.

    Args:
        policy: its name, for messages.
        given: as in `PolicyConfig.arguments`, which has checked the names.
        signature: what the policy takes.
        tasks: names, in the order of the losses.

    Raises:
        ValueError: a missing argument, or a value out of bounds.
    """
    resolved = {}
    for name, argument in signature.items():
        value = given.get(name, argument.default)
        if value is REQUIRED:
            raise ValueError(
                f"policy.arguments.{name} is missing; policy {policy!r} needs it: "
                f"{argument.expected}."
            )
        try:
            resolved[name] = argument.accept(value, tasks)
        except (ValueError, TypeError):
            raise ValueError(
                f"policy.arguments.{name} of policy {policy!r} is {value!r}; expected "
                f"{argument.expected} (tasks: {', '.join(tasks)})."
            ) from None
    return resolved


def _finite(value: Any) -> float:
    _demand(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    return float(value)


def _demand(condition: bool) -> None:
    if not condition:
        raise ValueError
