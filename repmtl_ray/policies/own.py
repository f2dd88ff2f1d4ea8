"""Policies of the user's own: what is checked before a class of theirs trains.

Owns the checks, each with one message that says what to do. What a policy is stands in `base.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from repmtl_ray.conversion import nearest, shown
from repmtl_ray.policies.arguments import arguments_of
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.state import HasState
from repmtl_ray.policy_names import OwnPolicy

_STORED = (type(None), bool, int, float, str, list, tuple, dict, Tensor, HasState)


def class_of_own(name: str) -> type[Policy]:
    """The class that the name of a policy of the user's own carries.

    Args:
        name: as `PolicyConfig.name` has it.

    Raises:
        ValueError: the name was read from a file and has no class; the class is no policy, lacks a
            method, or has an attribute that no configuration can set.
    """
    if not isinstance(name, OwnPolicy):
        raise ValueError(
            f"policy.name is {name!r}, a policy of the user's own, whose code is in no file; hand "
            "over its class: PolicyConfig(name=...)."
        )
    policy = name.policy
    if not issubclass(policy, Policy):
        raise ValueError(
            f"{_where(policy)}, which is no policy; derive it from LossPolicy or Policy of "
            "repmtl_ray.policies.base, GramianPolicy of repmtl_ray.policies.gramian or "
            "JacobianPolicy of repmtl_ray.policies.jacobian."
        )
    if inspect.isabstract(policy):
        missing = ", ".join(f"{method}()" for method in sorted(policy.__abstractmethods__))
        raise ValueError(
            f"{_where(policy)}, which does not define {missing}; docs/own_policy.md shows how."
        )
    _check_attributes(policy)
    return policy


def make_own(
    policy: type[Policy], tasks: Sequence[str], seed: int, arguments: Mapping[str, Any]
) -> Policy:
    """A policy of the user's own, whose state a checkpoint can hold.

    Args:
        policy: from `class_of_own`.
        tasks, seed, arguments: as for `build`.

    Raises:
        ValueError: an argument that it does not take or does not allow; state that no checkpoint can
            hold; an error of its own constructor.
    """
    allowed = [
        *arguments_of(policy),
        *(["at_representation"] if policy.allows_representation else []),
    ]
    for key, value in arguments.items():
        if key not in allowed:
            raise ValueError(
                f"policy.arguments.{key} is {shown(value)}, but policy {policy.name!r} takes no "
                f"argument {key!r}; {nearest(key, allowed) if allowed else 'it takes none.'}"
            )
    try:
        made = policy(tasks=tasks, seed=seed, **arguments)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{_where(policy)}, which cannot be made ({type(error).__name__}: {error}); it must be "
            "made from `tasks`, `seed` and its arguments, and its __post_init__ must call super()'s."
        ) from error
    for name in policy.state_names:
        value = getattr(made, name, made)
        if value is made:
            raise ValueError(
                f"{_where(policy)}, whose state_names have {name!r}, but a policy that was just made "
                "has no such attribute; set it in __post_init__."
            )
        if not isinstance(value, _STORED):
            raise ValueError(
                f"{_where(policy)}, whose state {name!r} is {shown(value)}; a checkpoint holds "
                "tensors, numbers, strings, truth values, None, and lists and mappings of these."
            )
    return made


def _check_attributes(policy: type[Policy]) -> None:
    """Refuses annotated attributes that look like arguments and are none."""
    hints = typing.get_type_hints(policy, include_extras=True)
    known = {entry.name for kind in (Policy, GramianPolicy) for entry in dataclasses.fields(kind)}
    for cls in policy.__mro__:
        if cls.__module__.partition(".")[0] == "repmtl_ray":
            continue
        names = [
            name
            for name in inspect.get_annotations(cls)
            if typing.get_origin(hints[name]) is not typing.ClassVar and name not in known
        ]
        if names and "__dataclass_fields__" not in vars(cls):
            raise ValueError(
                f"{_where(policy)}, whose attribute {names[0]!r} cannot be set; decorate the class "
                f"{cls.__qualname__} with @dataclass(kw_only=True, eq=False)."
            )
    ruled = arguments_of(policy)
    for entry in dataclasses.fields(policy):
        if entry.init and entry.name not in known and entry.name not in ruled:
            raise ValueError(
                f"{_where(policy)}, whose argument {entry.name!r} has the annotation "
                f"{entry.type!r}, which says no rule; take one of repmtl_ray.policies.arguments, for "
                "example Positive or Annotated[float, Number(at_least=0)], or field(init=False)."
            )


def _where(policy: type) -> str:
    return f"policy.name is the class {policy.__qualname__}"
