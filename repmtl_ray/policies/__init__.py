"""The policies by name: which there are, the checks before a run, and how one is made.

Every method has a module of its own here, named as the policy in small letters ("Nash-MTL" is in
`nash_mtl.py`); what a policy is stands in `base.py`. A method's module is imported when the policy
is asked for, and TorchJD when it is first used: this package itself loads no solver. Only modules
of this package import TorchJD.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from repmtl_ray.config import PolicyConfig
from repmtl_ray.policy_names import ARGUMENTS, check_names, is_own, name_of

if TYPE_CHECKING:
    from repmtl_ray.policies.base import Policy

__all__ = ["build", "check", "class_of", "gradient_places", "names", "ready"]


def names() -> tuple[str, ...]:
    """Every name that `PolicyConfig.name` may have, sorted."""
    return tuple(sorted(ARGUMENTS))


def ready(num_tasks: int) -> tuple[str, ...]:
    """The names of the policies that train so many tasks without arguments of their own and without
    a holdout split, and whose libraries are installed; sorted."""
    trainable = []
    for name in names():
        try:
            policy = build(name, num_tasks=num_tasks)
        except ValueError:  # it needs arguments, a library, or more or fewer tasks
            continue
        if not policy.needs_holdout:
            trainable.append(name)
    return tuple(trainable)


def class_of(name: str) -> type[Policy]:
    """The class of a policy, whose docstring says what it computes, where from, and its arguments.

    Raises:
        ValueError: an unknown name, or a class of the user's own that is no whole policy.
    """
    if is_own(name):
        from repmtl_ray.policies.own import class_of_own

        return class_of_own(name)
    check_names(name, {})
    module = importlib.import_module(f"{__name__}.{name.lower().replace('-', '_')}")
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    (policy,) = (cls for cls in classes if vars(cls).get("name") == name)
    return policy


def gradient_places(name: str) -> tuple[str, ...]:
    """Where a policy can combine task gradients: "parameters", "representation", or nowhere if it
    weighs losses."""
    from repmtl_ray.policies.base import LossPolicy

    policy = class_of(name)
    if issubclass(policy, LossPolicy):
        return ()
    return ("parameters", "representation") if policy.allows_representation else ("parameters",)


def check(
    config: PolicyConfig,
    tasks: Sequence[str],
    *,
    max_gradient_norm: float | None = None,
    share: float | None = None,
    eval_split: str | None = None,
) -> None:
    """Finds, before any training, whatever would keep a policy from being made or used.

    Args:
        config: the policy's part of an experiment.
        tasks: names, in the order of the losses.
        max_gradient_norm: the optimiser's part.
        share: the regulariser's part.
        eval_split: the split that a run evaluates on after every epoch; None if that is not known.

    Raises:
        ValueError: as `build`; clipping, or a penalty's share of the gradient, where there is no
            gradient to clip or to take a share of; a run without the holdout split that the policy
            needs.
    """
    policy = build(config, tasks)
    if policy.needs_holdout and eval_split not in (None, "holdout"):
        raise ValueError(
            f"policy {config.name!r} is steered by batches of the holdout split (policy.arguments."
            f"outer is 'holdout'), but data.eval_split is {eval_split!r}. Set data.holdout and "
            "data.eval_split='holdout', or outer='train', which halves the training batch."
        )
    if policy.makes_update and max_gradient_norm is not None:
        raise ValueError(
            f"optimizer.max_gradient_norm is {max_gradient_norm!r}, but policy {config.name!r} "
            "makes the update itself, from gradients that it brings to one size: there is none to "
            "clip. Set max_gradient_norm to None."
        )
    if policy.makes_update and share is not None:
        raise ValueError(
            f"regularizer.share is {share!r}, but policy {config.name!r} makes the update itself and gives "
            "the penalty a step of its own: there is no gradient to take a share of. Set share to "
            "None, or take another policy."
        )
    if share is not None and not policy.allows_share:
        raise ValueError(
            f"regularizer.share is {share!r}, but policy {config.name!r} takes task gradients at "
            "other parameters than the penalty's: there is no one gradient to take a share of. Set "
            "share to None, or take another policy."
        )


def build(
    policy: PolicyConfig | str | type[Policy],
    tasks: Sequence[str] = (),
    *,
    num_tasks: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Policy:
    """Makes a policy.

    Args:
        policy: the policy's part of an experiment, a name from `names()`, or a class of your own.
        tasks: names, in the order of the losses.
        num_tasks: in place of `tasks`: so many, named "task_0", "task_1", ...
        seed: of the run.
        arguments: the policy's own; they go before those of a configuration.

    Raises:
        ValueError: a number of tasks that the policy cannot train, an argument that is unknown,
            missing or not allowed, `gradients="representation"` where it means nothing, arguments
            that do not fit log losses.

    Example:
        >>> policy = build("CAGrad", num_tasks=2, c=0.5)
        >>> combined = policy.combine(torch.eye(2), torch.ones(2))  # [T, P] gradients, [T] losses
    """
    if isinstance(policy, PolicyConfig):
        config = dataclasses.replace(policy, arguments={**policy.arguments, **arguments})
    else:
        config = PolicyConfig(name=name_of(policy), arguments=arguments, log_losses=False)
    arguments = dict(config.arguments)
    if num_tasks is not None:
        tasks = [f"task_{number}" for number in range(num_tasks)]
    cls = class_of(config.name)
    _check_tasks(config.name, tasks)
    _check_missing(cls, arguments)
    if config.gradients == "representation":
        if not cls.allows_representation:
            raise ValueError(_no_representation(config.name))
        arguments["at_representation"] = True
    if is_own(config.name):
        from repmtl_ray.policies.own import make_own

        built = make_own(cls, tasks, seed, arguments)
    else:
        built = cls(tasks=tasks, seed=seed, **arguments)
    built.check_loss_scale(log_losses=config.log_losses)
    return built


def _check_tasks(name: str, tasks: Sequence[str]) -> None:
    if name == "stl":
        if len(tasks) != 1:
            raise ValueError(
                f"policy 'stl' trains one task, found {len(tasks)} ({', '.join(tasks)}); name "
                "one in `tasks`, or take 'EW'."
            )
    elif len(tasks) < 2:
        raise ValueError(
            f"policy {name!r} weighs tasks against each other, found {len(tasks)} "
            f"({', '.join(tasks)}); take policy 'stl' for one task."
        )


def _check_missing(policy: type[Policy], given: dict[str, Any]) -> None:
    from repmtl_ray.policies.arguments import REQUIRED, arguments_of

    for name, argument in arguments_of(policy).items():
        if argument.default is REQUIRED and name not in given:
            raise ValueError(
                f"policy.arguments.{name} is missing; policy {policy.name!r} needs it: "
                f"{argument.rule.expected}."
            )


def _no_representation(name: str) -> str:
    able = ", ".join(other for other in names() if class_of(other).allows_representation)
    if gradient_places(name):
        reason = "its method needs task gradients at the parameters"
    else:
        reason = "it weighs losses, so it makes no difference where gradients are taken"
    return (
        f"policy.gradients is 'representation', but policy {name!r} cannot use it: {reason}. Set it "
        f"to 'parameters', or take one of {able}."
    )
