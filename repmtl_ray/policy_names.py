"""The names of the policies and of their arguments, so that a configuration can refuse other names.

Owns two tables, one check, and the name of a policy of the user's own. The defaults and the bounds of
the arguments stand in the policies' own modules, which need torch; a test compares the tables with
them. This module needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from repmtl_ray import user_code
from repmtl_ray.conversion import nearest, shown

_EVERY = (
    *("normalize", "combined", "max_norm"),
    *("head_weights", "update_weights_every", "parameter_blocks", "momentum_of_weights"),
)
"""Of every policy that reads the Gramian alone, after its own."""
_EVERY_BUT_CLIPPING = tuple(name for name in _EVERY if name != "max_norm")
_EVERY_BUT_SCALE = tuple(name for name in _EVERY if name != "combined")
_EVERY_BUT_BOTH = tuple(name for name in _EVERY_BUT_SCALE if name != "max_norm")
"""Of those that have another default for `max_norm` or `combined`, which then stands among their own."""
_ROWS = ("normalize", "combined", "max_norm")
"""Of every policy that looks at every coordinate of the gradients, after its own."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "Aligned-MTL": ("scale_mode", *_EVERY),
    "Auto-Lambda": ("inner_learning_rate", "outer", "outer_learning_rate"),
    "CAGrad": ("c", "scale", "norm_eps", "combined", *_EVERY_BUT_SCALE),
    "ConFIG": _EVERY,
    "ConsMTL": ("lambda_", "clip", "max_norm"),
    "Constant": ("weights",),
    "COSMOS": ("lambda_", "weights"),
    "DB-MTL": ("beta", "beta_sigma", *_ROWS),
    "DualProj": ("reg_eps", *_EVERY),
    "DWA": ("temperature",),
    "EW": (),
    "ExcessMTL": ("robust_step_size", "n_warmup_steps", "sum_to", "head_weights", *_ROWS),
    "FairGrad": ("alpha", "max_iters", "combined", "max_norm", *_EVERY_BUT_BOTH),
    "F-MTL": ("radius", "adaptive", "aggregate", "base", "base_arguments"),
    "FAMO": ("learning_rate", "weight_decay"),
    "FORUM": ("pull", "inner_learning_rate", "inner_steps", "outer", "outer_learning_rate"),
    "GLS": (),
    "GO4Align": ("num_groups", "step_size"),
    "GradDrop": ("leak", *_ROWS),
    "GradNorm": ("alpha", "learning_rate", "initial_losses"),
    "GradVac": ("beta", "eps", *_EVERY),
    "IGBv2": (
        *("learning_rate", "replay_size", "batch_size"),
        *("random_epochs", "baseline_epoch", "learning_epoch", "learn_every"),
    ),
    "IMTL": ("learning_rate", *_EVERY),
    "IMTL-G": _EVERY,
    "IMTL-L": ("learning_rate",),
    "Krum": ("n_byzantine", "n_selected", *_EVERY),
    "Mean": (),
    "LDC-MTL": ("lambda_", "learning_rate", "normalization"),
    "MetaBalance": ("main", "relax", "beta", *_ROWS),
    "MGDA": ("normalization", "sum_to", "epsilon", "max_iters", *_EVERY),
    "MoCo": ("beta", "beta_sigma", "gamma", "gamma_sigma", "rho", "projection", "length", *_ROWS),
    "MoDo": ("gamma", "rho"),
    "MOML": ("inner_learning_rate", "outer", "outer_learning_rate"),
    "MTAdam": ("anchor", "beta1", "beta2", "norm_beta", "eps", "ranks"),
    "Nash-MTL": ("max_norm", "optim_niter", *_EVERY_BUT_CLIPPING),
    "PBI": ("theta", "weights", "reference"),
    "PCD": ("primary", "tau", "beta", "eps", *_EVERY),
    "PCGrad": _EVERY,
    "PIVRG": (
        *("single_task_losses", "bound", "min_temperature", "combined", "max_norm"),
        *_EVERY_BUT_BOTH,
    ),
    "RGW": ("sum_to", *_EVERY),
    "RLW": ("sum_to",),
    "SAMO": ("radius", "share_global", "mu", "base", "base_arguments"),
    "SDMGrad": ("lambda_", "learning_rate", "momentum", "num_iterations", "num_parts"),
    "Sel-Update": ("beta", "warmup_steps", "credit"),
    "STCH": ("mu", "warmup_epochs", "sum_to"),
    "stl": (),
    "TrimmedMean": ("trim_number", *_ROWS),
    "UPGrad": ("reg_eps", *_EVERY),
    "UW": ("learning_rate",),
    "UW-SO": ("temperature",),
}
"""By policy, the names of its arguments in the order of its constructor."""

OTHER_NAMES: Mapping[str, str] = {
    "equal": "'EW'",
    "equalweighting": "'EW'",
    "sum": "'EW'",
    "ls": "'EW' with log_losses off",
    "linearscalarization": "'EW' with log_losses off",
    "scaleinvls": "'EW' with log_losses on",
    "si": "'EW' with log_losses on",
    "uncertainty": "'UW'",
    "uncertaintyweighting": "'UW'",
    "random": "'RLW' on losses or 'RGW' on gradients",
    "geometricmean": "'GLS'",
    "dynamicweightaverage": "'DWA'",
    "mgdaub": "'MGDA' with gradients=\"representation\"",
    "alignedmtlub": "'Aligned-MTL' with gradients=\"representation\"",
    "gradientvaccine": "'GradVac'",
    "singletask": "'stl'",
    "imtlhybrid": "'IMTL'",
    "igb": "'IGBv2'",
    "igbv1": "'IGBv2', the learnt form",
    "softoptimaluncertaintyweighting": "'UW-SO'",
    "uwo": "'EW' with log_losses on",
    "psmgd": "'MGDA' with update_weights_every=8 and sum_to=\"tasks\"",
    "fsmtl": "'F-MTL'",
    "selectivetaskgroupupdates": "'Sel-Update'",
    "selupdatemtl": "'Sel-Update'",
    "bilb4mtl": "'LDC-MTL'",
    "crmogm": "the argument momentum_of_weights of a gradient policy, for example of 'MGDA'",
}
"""By the name that another library uses, in small letters and digits alone: the name here."""


class OwnPolicy(str):
    """The name of a policy of the user's own, "<name>@<identity of its code>", with its class.

    So the class goes wherever the name goes: into other configurations and to other processes. A
    name that was read from a file is a plain string, and has no class.

    Args:
        text: the name.
        policy: the class.
        arguments: what it was given as a `functools.partial` or an instance; `PolicyConfig` takes
            them out of the name.
    """

    policy: type[Any]
    arguments: Mapping[str, Any]

    def __new__(
        cls, text: str, policy: type[Any], arguments: Mapping[str, Any] = types.MappingProxyType({})
    ) -> OwnPolicy:
        name = super().__new__(cls, text)
        name.policy, name.arguments = policy, dict(arguments)
        return name

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.policy, self.arguments


_OWN = re.compile(r"[\w.+-]+@[0-9a-f]{12}")


def is_own(name: str) -> bool:
    """Whether a name is that of a policy of the user's own."""
    return _OWN.fullmatch(name) is not None


def stands_for_policy(value: object) -> bool:
    """Whether a value that is no name may say which policy is meant."""
    is_instance = dataclasses.is_dataclass(value) and hasattr(value, "state_names")
    return isinstance(value, type | functools.partial) or is_instance


def name_of(policy: object) -> str:
    """The name of a policy that is given by its name, by its class or as an instance.

    Args:
        policy: a name, which stays as it is; a class; a `functools.partial` of a class; or an
            instance, which stands for its class and arguments, because every run makes its own.

    Raises:
        ValueError: none of them, a class without a name of its own, or an instance with a history.
    """
    if isinstance(policy, str):
        return policy
    cls, arguments = _class_and_arguments(policy)
    name = getattr(cls, "name", None)
    if cls.__module__.partition(".")[0] == "repmtl_ray" and name in ARGUMENTS:
        if arguments:
            raise ValueError(
                f"policy.name is {shown(policy)}; of a policy of this project give the name, and its "
                f"arguments beside it: PolicyConfig(name={name!r}, arguments={shown(arguments)})."
            )
        return str(name)
    if not (isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name)):
        raise ValueError(
            f"policy.name is the class {cls.__qualname__}, whose attribute `name` is "
            f"{shown(name)}; give the class a name of letters and digits, which tables and messages "
            f'show, for example name = "{cls.__name__}".'
        )
    _resolve_annotations(cls)
    code = user_code.identity([cls, arguments] if arguments else cls)
    return OwnPolicy(f"{name}@{code}", cls, arguments)


def _class_and_arguments(policy: object) -> tuple[type[Any], dict[str, Any]]:
    """The class that something stands for, and what a run gives it beside `tasks` and `seed`."""
    if isinstance(policy, type):
        return policy, {}
    if isinstance(policy, functools.partial) and isinstance(policy.func, type) and not policy.args:
        return policy.func, dict(policy.keywords)
    if not stands_for_policy(policy) or isinstance(policy, functools.partial):
        raise ValueError(
            f"policy.name is {shown(policy)}; expected the name of a policy, or a class of your own, "
            "whose arguments are policy.arguments."
        )
    if getattr(policy, "step", 0):
        raise ValueError(
            f"policy.name is an instance of {type(policy).__qualname__} that has made steps, and a run "
            "makes a policy of its own; hand over the class, or an instance that was not used."
        )
    return type(policy), {
        entry.name: getattr(policy, entry.name)
        for entry in dataclasses.fields(typing.cast(Any, policy))
        if entry.init
        and entry.name not in ("tasks", "seed")
        and getattr(policy, entry.name) != entry.default
    }


def _resolve_annotations(policy: type[Any]) -> None:
    """Puts objects in the place of annotations that are text: the class may go to a process that has
    no copy of the module where the names of the text mean something."""
    for cls in policy.__mro__:
        own = inspect.get_annotations(cls)
        if not any(isinstance(annotation, str) for annotation in own.values()):
            continue
        if cls.__module__.partition(".")[0] == "repmtl_ray":
            continue
        methods = [part for part in vars(cls).values() if isinstance(part, types.FunctionType)]
        seen = {name: part for method in methods for name, part in method.__globals__.items()}
        try:
            hints = typing.get_type_hints(cls, localns=seen, include_extras=True)
        except NameError as error:
            raise ValueError(
                f"policy.name is the class {policy.__qualname__}, whose annotations have a name that "
                f"its module lacks ({error}); import it at the top of the module."
            ) from None
        cls.__annotations__ = {name: hints[name] for name in own}


def check_names(policy: str, arguments: Mapping[str, Any]) -> None:
    """Refuses a name that belongs to no policy, or an argument that the policy does not take.

    Args:
        policy: as `PolicyConfig.name`.
        arguments: as `PolicyConfig.arguments`; the values are not read.

    Raises:
        ValueError: the message offers the right name, also for what other libraries call a policy.
    """
    if is_own(policy):  # its class knows its arguments
        return
    if policy not in ARGUMENTS:
        by_letters = {letters_of(known): repr(known) for known in ARGUMENTS} | dict(OTHER_NAMES)
        here = by_letters.get(letters_of(policy))
        offer = f"here it is {here}." if here else nearest(policy, ARGUMENTS)
        raise ValueError(f"policy.name is {policy!r}, which is no policy; {offer}")
    allowed = ARGUMENTS[policy]
    for name, value in arguments.items():
        if name not in allowed:
            guess = f"{nearest(name, allowed)} " if allowed else ""
            raise ValueError(
                f"policy.arguments.{name} is {value!r}, but policy {policy!r} takes no argument "
                f"{name!r}; {guess}Allowed: {', '.join(allowed) or 'none'}. docs/methods.md has "
                "their defaults."
            )


def letters_of(name: str) -> str:
    """A name in small letters and digits alone, as the keys of `OTHER_NAMES`."""
    return re.sub("[^a-z0-9]", "", name.lower())
