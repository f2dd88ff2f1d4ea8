"""Dataclasses as plain values and back, with errors that say where, what and what instead.

Owns the one way from any frozen dataclass to JSON and back: of configurations, whose classes are in
`config.py`, and of what is stored beside results and samples.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

C = TypeVar("C")

_DEEPEST = 8  # levels of a mapping
_ADDED = "added"  # in the metadata of a field, its default
_hints: dict[type, Mapping[str, Any]] = {}


class ExperimentError(ValueError):
    """An experiment that cannot be trained, or cannot be continued.

    All workers raise it alike, and would raise it again: a restart does not help.
    """


class NonFiniteLossError(ExperimentError):
    """A loss or gradient that no update can be made from.

    It is infinite or not a number, or it is a loss that is not positive where its logarithm is
    trained on. Parameters and optimiser state are as they were before the step.
    """


class NonFiniteGradientError(NonFiniteLossError):
    """A gradient that is infinite or not a number, of losses that are finite."""


def check(condition: bool, where: str, value: object, expected: str) -> None:
    """Raises "<where> is <value>; expected <expected>." unless the condition holds."""
    if not condition:
        raise ValueError(f"{where} is {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """A value as messages show it: on one line, of at most 200 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of an integer with too many digits, of deep nesting
        text = "\n"
    if "\n" in text:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_range(
    where: str, value: float | None, minimum: float, maximum: float, *, above: bool = False
) -> None:
    """Refuses a number that is not finite or lies outside its range; None is allowed.

    Args:
        where: what messages call the number.
        value: the number.
        minimum, maximum: the ends of the range; both belong to it.
        above: whether `minimum` itself is refused.

    Raises:
        ValueError: names the number and its range.
    """
    if value is not None:  # a NaN compares as False
        inside = (minimum < value if above else minimum <= value) and value <= maximum
        bound = f"{'>' if above else '>='} {minimum:,}"
        check(inside, where, value, f"a finite number {bound} and <= {maximum:,}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of an error message that offers the names closest to `name`, or else all of them."""
    names = sorted(known)
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(folded[match]) for match in close) + "?"
    return "known names: " + ", ".join(names)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-compatible values; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _hints_of(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, by name."""
    if cls not in _hints:  # Python compiles every annotation of a class again for each call
        _hints[cls] = typing.get_type_hints(cls)
    return _hints[cls]


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Builds a dataclass from nested plain values, which `to_dict` makes.

    Args:
        cls: the dataclass, for example Experiment or one of its parts.
        values: field names to values, nested like the classes.
        where: dotted prefix for messages.

    Raises:
        ValueError: an unknown key (the nearest valid ones are offered), a missing or ill-typed
            value.
    """
    hints = _hints_of(cls)
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else f"{key}"
        check(isinstance(key, str), f"a field of {where or cls.__name__}", key, "a name")
        if key not in fields:
            raise ValueError(f"{path} is not a field of {cls.__name__}; {nearest(key, fields)}")
        arguments[key] = _convert(hints[key], value, path)
    for name, entry in fields.items():
        required = (
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        )
        if required and name not in arguments:
            raise ValueError(
                f"{where + '.' if where else ''}{name} is missing from {cls.__name__}."
            )
    return cls(**arguments)


def check_types(config: Any, where: str = "") -> None:
    """Refuses fields whose values are not what their annotations say.

    It is called when an object is made. Where the annotation is a float or a tuple, integers become
    floats and lists become tuples, so that equal configurations have equal plain values.

    Args:
        config: a frozen dataclass.
        where: what messages call it.
    """
    hints = _hints_of(type(config))
    for entry in dataclasses.fields(config):
        path = f"{where}.{entry.name}" if where else entry.name
        value = _convert(hints[entry.name], getattr(config, entry.name), path)
        object.__setattr__(config, entry.name, value)


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], **not_loaded: Any
) -> None:
    """Refuses arguments of a public function whose types are not what its annotations say.

    Args:
        function: its annotations are looked up where it is defined.
        arguments: by name; those that have no annotation are passed over.
        not_loaded: types by the names that annotations give them, where the module of the function
            does not import them.

    Raises:
        ValueError: names the first argument, its value and what was expected.
    """
    hints = typing.get_type_hints(function, localns=not_loaded or None)
    for name, value in arguments.items():
        if name in hints:
            _check_argument(hints[name], value, name)


def _check_argument(hint: Any, value: Any, path: str) -> None:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return
        options = [option for option in inner if option is not type(None)]
        if len(options) > 1:
            kinds = {option: typing.get_origin(option) or option for option in options}
            fitting = [option for option, kind in kinds.items() if isinstance(value, kind)]
            names = " or ".join(kind.__name__ for kind in kinds.values())
            check(bool(fitting), path, value, f"a value of type {names}")
            if typing.get_origin(fitting[0]) is not None:
                _check_argument(fitting[0], value, path)
            return
        also = " or None"
        hint, origin, inner = options[0], typing.get_origin(options[0]), typing.get_args(options[0])
    else:
        also = ""
    if origin is Literal:
        check(value in inner, path, value, "one of " + ", ".join(map(repr, inner)))
    elif hint in (int, bool):
        check(type(value) is hint, path, value, f"a value of type {hint.__name__}{also}")
    elif origin is not None and issubclass(origin, Mapping):
        check(isinstance(value, Mapping), path, value, f"a mapping{also}")
        for key, item in value.items():
            _check_argument(inner[0], key, f"a key of {path}")
            _check_argument(inner[1], item, f"{path}[{shown(key)}]")
    elif origin is not None and issubclass(origin, Sequence):
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        check(is_list, path, value, f"a list{also}")
        for place, item in enumerate(value):
            _check_argument(inner[0], item, f"{path}[{place}]")
    elif isinstance(hint, type):
        check(isinstance(value, hint), path, value, f"a value of type {hint.__name__}{also}")


def _convert(hint: Any, value: Any, path: str) -> Any:
    """A value as its annotation `hint` says, or an error that names `path`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        check(isinstance(value, Mapping), path, value, f"the fields of {hint.__name__}")
        return from_dict(hint, value, path)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        options: list[Any] = [option for option in inner if option is not type(None)]
        if Any in options and type(value) not in options:
            return value
        is_list = isinstance(value, list | tuple)
        exact = [option for option in options if type(value) is option]
        listed = [option for option in options if is_list and str(option).startswith("tuple[")]
        return _convert((exact or listed or options)[0], value, path)
    if origin is Literal:
        check(value in inner, path, value, "one of " + ", ".join(map(repr, inner)))
        return value
    if origin in (tuple, list):
        check(isinstance(value, list | tuple), path, value, "a list")
        return origin(_convert_items(inner, value, path))
    if isinstance(hint, type) and issubclass(hint, tuple):  # a NamedTuple
        check(isinstance(value, list | tuple), path, value, "a list")
        return hint(*_convert_items(tuple(typing.get_type_hints(hint).values()), value, path))
    if origin is not None and issubclass(origin, Mapping) and inner[1] is not Any:
        check(isinstance(value, Mapping), path, value, "a mapping")
        return {
            _convert(inner[0], key, path): _convert(inner[1], item, f"{path}.{key}")
            for key, item in value.items()
        }
    if hint is float:
        check(
            isinstance(value, int | float) and not isinstance(value, bool), path, value, "a number"
        )
        try:
            return float(value)
        except OverflowError:  # Python's integers have no limit
            raise ValueError(f"{path} is an integer beyond the range of a float.") from None
    if hint in (int, str, bool):
        check(type(value) is hint, path, value, f"a value of type {hint.__name__}")
        return value
    check(isinstance(value, Mapping), path, value, "a mapping")
    return _plain(value, path)


def _convert_items(hints: tuple[Any, ...], values: Sequence[Any], path: str) -> Iterator[Any]:
    """The items of a list. There is one hint for all (of a list, or before an ellipsis), or one per
    item."""
    if len(hints) == 1 or hints[-1] is ...:
        hints = (hints[0],) * len(values)
    check(len(values) == len(hints), path, values, f"{len(hints)} values")
    for hint, value in zip(hints, values, strict=True):
        yield _convert(hint, value, path)


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    """A value as JSON keeps it, so that what is read back is equal to what was stored.

    Raises:
        ValueError: a value that JSON cannot hold, or that is not equal to itself (NaN).
    """
    check(depth <= _DEEPEST, path, "...", f"at most {_DEEPEST} levels")
    if isinstance(value, Mapping):
        for key in value:
            check(isinstance(key, str), path, value, "names that are strings")
        return {key: _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path, depth + 1) for item in value]
    if isinstance(value, float):
        check(math.isfinite(value), path, value, "a finite number")
    check(
        value is None or type(value) in (bool, int, float, str),
        path,
        value,
        "a number, a string, a truth value, None, or lists and mappings of these",
    )
    return value


def added(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that was added after experiments had been stored.

    The digest of a configuration leaves it out while it has its default, so that stored experiments
    keep their digests.
    """
    metadata = {_ADDED: default if factory is dataclasses.MISSING else factory()}
    if factory is dataclasses.MISSING:
        return dataclasses.field(default=default, metadata=metadata)
    return dataclasses.field(default_factory=factory, metadata=metadata)


def digest(config: Any) -> str:
    """Twelve hexadecimal digits that identify a configuration; equal configurations have equal
    digests."""
    return hashlib.sha256(
        json.dumps(_values_for_digest(config), sort_keys=True).encode()
    ).hexdigest()[:12]


def _values_for_digest(config: Any) -> dict[str, Any]:
    values = to_dict(config)
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if is_at_added_default(config, entry):
            del values[entry.name]
        elif dataclasses.is_dataclass(value):
            values[entry.name] = _values_for_digest(value)
    return values


def is_at_added_default(config: Any, entry: dataclasses.Field[Any]) -> bool:
    """Whether a field was `added` and has the value that stands for its absence."""
    return _ADDED in entry.metadata and getattr(config, entry.name) == entry.metadata[_ADDED]


def differences(old: Any, new: Any) -> str:
    """Which values of two configurations or mappings differ, as "path was x, is y"; empty if none."""
    old, new = (dict(v) if isinstance(v, Mapping) else to_dict(v) for v in (old, new))
    return _differences(old, new, "")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> str:
    parts = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            parts.append(_differences(before, after, f"{prefix}{key}."))
        elif before != after:
            was, is_ = (repr(side[key]) if key in side else "absent" for side in (old, new))
            parts.append(f"{prefix}{key} was {was}, is {is_}")
    return ", ".join(part for part in parts if part)
