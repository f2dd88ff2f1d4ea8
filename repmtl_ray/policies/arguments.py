"""The arguments of policies: which values each allows, read from the policies' constructors.

Owns the rules, their messages and the reading. A policy is a dataclass. A field whose annotation
holds a rule is an argument that a user sets (`PolicyConfig.arguments`); its default is the field's.
Owns no policy; needs no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from repmtl_ray.policy_names import ARGUMENTS

REQUIRED = "required"
"""Stands for the default of an argument that has none."""


class Rule(ABC):
    """What an argument may be."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """The end of the sentence "... is 3; expected ..."."""

    @abstractmethod
    def accept(self, value: Any, tasks: Sequence[str]) -> Any:
        """The value as the policy takes it.

        Raises:
            ArithmeticError, TypeError, ValueError: the rule does not allow the value.
        """


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite number between bounds, or None where that is allowed."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    or_none: bool = False

    @property
    def bounds(self) -> str:
        bounds = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return " and ".join(
            f"{sign} {bound:g}" for sign, bound in bounds.items() if abs(bound) < math.inf
        )

    @property
    def expected(self) -> str:
        return f"a finite number {self.bounds}".rstrip() + " or None" * self.or_none

    def accept(self, value: Any, tasks: Sequence[str]) -> float | None:
        if value is None and self.or_none:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(is_number and math.isfinite(value))
        _require(self.at_least <= value <= self.at_most and self.above < value < self.below)
        return float(value)


@dataclass(frozen=True, kw_only=True)
class Integer(Rule):
    """A whole number between bounds, or None where that is allowed."""

    at_least: int
    at_most: float = math.inf
    or_none: bool = False

    @property
    def expected(self) -> str:
        upper = f" and <= {self.at_most}" if self.at_most < math.inf else ""
        return f"an integer >= {self.at_least}{upper}" + " or None" * self.or_none

    def accept(self, value: Any, tasks: Sequence[str]) -> int | None:
        if value is None and self.or_none:
            return None
        _require(type(value) is int and self.at_least <= value <= self.at_most)
        return int(value)


@dataclass(frozen=True)
class Choice(Rule):
    """One of a few words; the rule of every `Literal`."""

    options: tuple[str, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(map(repr, self.options))

    def accept(self, value: Any, tasks: Sequence[str]) -> str:
        _require(value in self.options)
        return str(value)


class Boolean(Rule):
    """True or False."""

    expected = "True or False"

    def accept(self, value: Any, tasks: Sequence[str]) -> bool:
        _require(isinstance(value, bool))
        return bool(value)


class TaskName(Rule):
    """The name of a task; None is the first task."""

    expected = "a task's name, or None for the first"

    def accept(self, value: Any, tasks: Sequence[str]) -> str:
        _require(value is None or value in tasks)
        return tasks[0] if value is None else str(value)


class BasePolicy(Rule):
    """The name of another policy."""

    expected = "the name of a policy, for example 'FairGrad'"

    def accept(self, value: Any, tasks: Sequence[str]) -> str:
        _require(isinstance(value, str) and value in ARGUMENTS)
        return str(value)


class BaseArguments(Rule):
    """The arguments of another policy, by name; None is none. That policy checks them."""

    expected = "the arguments of the base policy by name, or None"

    def accept(self, value: Any, tasks: Sequence[str]) -> dict[str, Any]:
        _require(value is None or isinstance(value, Mapping))
        return dict(value or {})


@dataclass(frozen=True)
class NumberPerTask(Rule):
    """One number per task: one for all, a list in the tasks' order, or a mapping by task name."""

    number: Number = Number()
    not_all_zero: bool = False

    @property
    def expected(self) -> str:
        text = "one finite number per task (a list in the tasks' order or a mapping by task)"
        bounds = self.number.bounds
        return text + f", {bounds}" * bool(bounds) + ", not all 0" * self.not_all_zero

    def accept(self, value: Any, tasks: Sequence[str]) -> tuple[float, ...]:
        if isinstance(value, Mapping):
            _require(set(value) == set(tasks))
            value = [value[name] for name in tasks]
        elif not isinstance(value, (list, tuple)):
            value = [value] * len(tasks)
        _require(len(value) == len(tasks))
        numbers = tuple(cast(float, self.number.accept(number, tasks)) for number in value)
        _require(any(numbers) or not self.not_all_zero)
        return numbers


Positive = Annotated[float, Number(above=0)]
NonNegative = Annotated[float, Number(at_least=0)]
Fraction = Annotated[float, Number(at_least=0, at_most=1)]
Decay = Annotated[float, Number(at_least=0, below=1)]
"""The share of the old value in a moving average."""
PositiveInt = Annotated[int, Integer(at_least=1)]
NonNegativeInt = Annotated[int, Integer(at_least=0)]
Flag = Annotated[bool, Boolean()]
OneTask = Annotated[str | None, TaskName()]
PerTask = float | Sequence[float] | Mapping[str, float]
"""What a user may give for one number per task; the policy holds a tuple."""
ScaleOfWeights = Literal["one", "tasks"]
"""Whether weights sum to 1 or to the number of tasks."""
HeadWeights = Literal["official", "one", "weighted"]
"""What heads' own gradients are multiplied by: what the official code does, 1, the tasks' weights."""
Normalization = Literal["none", "l2", "loss", "loss+"]
"""What task gradients are divided by: nothing, their norms, their losses, or both."""


@dataclass(frozen=True)
class Argument:
    """One argument of a policy: its default (`REQUIRED` if there is none) and its rule."""

    default: Any
    rule: Rule


def arguments_of(policy: type) -> Mapping[str, Argument]:
    """The arguments of a policy by name, its own before those that its kind has.

    Args:
        policy: a dataclass.
    """
    hints = typing.get_type_hints(policy, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(policy) if field.init}
    names = [name for cls in policy.__mro__ for name in inspect.get_annotations(cls)]
    arguments = {}
    for name in dict.fromkeys(name for name in names if name in fields):
        rule = _rule_of(hints[name])
        if rule is not None:
            default = fields[name].default
            missing = default is dataclasses.MISSING
            arguments[name] = Argument(REQUIRED if missing else default, rule)
    return arguments


def accept_arguments(policy: Any, name: str, tasks: Sequence[str]) -> None:
    """Checks the arguments of a policy that was just made, and sets them to what their rules make
    of them.

    Args:
        policy: an instance of a dataclass.
        name: of the policy, for messages.
        tasks: names, in the order of the losses.

    Raises:
        ValueError: names the policy, the argument, its value and what is allowed.
    """
    for key, argument in arguments_of(type(policy)).items():
        value, rule = getattr(policy, key), argument.rule
        try:
            accepted = rule.accept(value, tasks)
        except (ArithmeticError, TypeError, ValueError):  # an integer may be too large for a float
            raise ValueError(
                f"policy.arguments.{key} of policy {name!r} is {value!r}; expected "
                f"{rule.expected} (tasks: {', '.join(tasks)})."
            ) from None
        setattr(policy, key, accepted)


def _rule_of(hint: Any) -> Rule | None:
    if typing.get_origin(hint) is Literal:
        return Choice(typing.get_args(hint))
    rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Rule)]
    return rules[0] if rules else None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError
