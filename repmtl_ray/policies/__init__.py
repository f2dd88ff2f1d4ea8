"""The policies by name: what each takes, the checks before a run, and how one is made.

Owns the table below and nothing else; what a policy is stands in `base.py`. Only modules of this
package import TorchJD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from repmtl_ray.config import PolicyConfig
from repmtl_ray.policies import (
    db_mtl,
    go4align,
    gradnorm,
    igbv2,
    imtl,
    metabalance,
    moco,
    mtadam,
    plain,
    torchjd_gradients,
    torchjd_jacobians,
    torchjd_losses,
    torchjd_parts,
    torchjd_solvers,
)
from repmtl_ray.policies.arguments import (
    REQUIRED,
    Signature,
    choice,
    integer,
    number,
    per_task,
    resolve,
    task,
)
from repmtl_ray.policies.base import LossPolicy, Policy
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policy_names import check_names

__all__ = ["build", "check", "gradient_places", "names", "ready"]


@dataclass(frozen=True)
class Entry:
    """A policy's class and the arguments it takes."""

    cls: Any
    signature: Signature

    @property
    def allows_representation(self) -> bool:
        return bool(self.cls.allows_representation)


def _entry(cls: Any, **signature: Any) -> tuple[str, Entry]:
    if issubclass(cls, GramianPolicy):
        signature["momentum_of_weights"] = number(0.0, at_least=0, below=1)
    return cls.name, Entry(cls, signature)


_ONE_OR_TASKS = choice("one", "tasks")
_POLICIES: dict[str, Entry] = dict(
    [
        _entry(plain.EW),
        _entry(plain.SingleTask),
        _entry(plain.Mean),
        _entry(plain.Constant, weights=per_task(REQUIRED, non_negative=True)),
        _entry(torchjd_losses.RLW, sum_to=_ONE_OR_TASKS),
        _entry(torchjd_losses.GLS),
        _entry(torchjd_losses.UW, learning_rate=number(0.025, above=0)),
        _entry(torchjd_losses.IMTLL, learning_rate=number(0.025, above=0)),
        _entry(torchjd_losses.DWA, temperature=number(2.0, above=0)),
        _entry(
            torchjd_losses.FAMO,
            learning_rate=number(0.025, above=0),
            weight_decay=number(1e-3, at_least=0),
        ),
        _entry(
            torchjd_losses.STCH,
            mu=number(1.0, above=0),
            warmup_epochs=integer(4, at_least=0),
            sum_to=choice("tasks", "one"),
        ),
        _entry(
            torchjd_losses.PBI,
            theta=number(5.0, at_least=0),
            weights=per_task(1.0, positive=True),
            reference=per_task(0.0),
        ),
        _entry(
            torchjd_losses.COSMOS,
            lambda_=number(REQUIRED, at_least=0),
            weights=per_task(1.0, positive=True),
        ),
        _entry(
            torchjd_gradients.MGDA,
            normalization=choice("none", "l2", "loss", "loss+"),
            sum_to=_ONE_OR_TASKS,
            epsilon=number(1e-3, above=0),
            max_iters=integer(100, at_least=1),
        ),
        _entry(torchjd_gradients.PCGrad),
        _entry(
            torchjd_gradients.GradVac,
            beta=number(0.5, at_least=0, at_most=1),
            eps=number(1e-8, above=0),
        ),
        _entry(torchjd_gradients.IMTLG),
        _entry(torchjd_gradients.AlignedMTL, scale_mode=choice("min", "median", "rmse")),
        _entry(
            torchjd_gradients.PCD,
            primary=task(),
            tau=number(0.02, at_least=0, at_most=1),
            beta=number(0.999, at_least=0, below=1),
            eps=number(1e-8, at_least=0),
        ),
        _entry(
            torchjd_gradients.Krum,
            n_byzantine=integer(0, at_least=0),
            n_selected=integer(1, at_least=1),
        ),
        _entry(torchjd_gradients.ConFIG),
        _entry(torchjd_gradients.RGW, sum_to=_ONE_OR_TASKS),
        _entry(
            torchjd_solvers.CAGrad,
            c=number(0.4, at_least=0),
            scale=number(1.0, above=0),
            norm_eps=number(1e-4, above=0),
        ),
        _entry(
            torchjd_solvers.NashMTL,
            max_norm=number(1.0, at_least=0),
            update_weights_every=integer(1, at_least=1),
            optim_niter=integer(20, at_least=1),
        ),
        _entry(
            torchjd_solvers.FairGrad,
            alpha=number(2.0, at_least=0),
            max_iters=integer(None, at_least=1),
        ),
        _entry(torchjd_solvers.UPGrad, reg_eps=number(1e-4, above=0)),
        _entry(torchjd_solvers.DualProj, reg_eps=number(1e-4, above=0)),
        _entry(torchjd_jacobians.GradDrop, leak=per_task(0.0, at_most=1)),
        _entry(torchjd_jacobians.TrimmedMean, trim_number=integer(1, at_least=0)),
        _entry(
            torchjd_jacobians.ExcessMTL,
            robust_step_size=number(1.0, above=0),
            n_warmup_steps=integer(0, at_least=0),
        ),
        _entry(imtl.IMTL, learning_rate=number(0.025, above=0)),
        _entry(
            gradnorm.GradNorm,
            alpha=number(1.5, at_least=0),
            learning_rate=number(0.025, above=0),
            initial_losses=choice("step", "epoch"),
        ),
        _entry(
            metabalance.MetaBalance,
            main=task(),
            relax=number(0.7, at_least=0, at_most=1),
            beta=number(0.9, at_least=0, below=1),
        ),
        _entry(
            db_mtl.DBMTL,
            beta=number(0.9, at_least=0, below=1),
            beta_sigma=number(0.0, at_least=0),
        ),
        _entry(
            moco.MoCo,
            beta=number(0.5, above=0, at_most=1),
            beta_sigma=number(0.5, at_least=0),
            gamma=number(0.1, above=0),
            gamma_sigma=number(0.5, at_least=0),
            rho=number(0.0, at_least=0),
            projection=choice("softmax", "euclidean"),
            length=choice("loss", "own"),
        ),
        _entry(
            go4align.GO4Align,
            num_groups=integer(2, at_least=1),
            step_size=number(1e-4, at_least=0),
        ),
        _entry(
            torchjd_parts.MoDo,
            gamma=number(0.1, above=0),
            rho=number(0.1, at_least=0),
        ),
        _entry(
            torchjd_parts.SDMGrad,
            lambda_=number(0.3, at_least=0),
            learning_rate=number(10.0, above=0),
            momentum=number(0.5, at_least=0, below=1),
            num_iterations=integer(20, at_least=1),
            num_parts=integer(3, at_least=2, at_most=3),
        ),
        _entry(
            mtadam.MTAdam,
            anchor=task(),
            beta1=number(0.9, at_least=0, below=1),
            beta2=number(0.999, at_least=0, below=1),
            norm_beta=number(0.9, at_least=0, below=1),
            eps=number(1e-8, at_least=0),
            ranks=per_task(1.0, positive=True),
        ),
        _entry(
            igbv2.IGBv2,
            learning_rate=number(3e-4, above=0),
            replay_size=integer(10_000, at_least=1),
            batch_size=integer(256, at_least=1),
            random_epochs=integer(5, at_least=0),
            baseline_epoch=integer(1, at_least=0),
            learning_epoch=integer(3, at_least=0),
            learn_every=integer(50, at_least=1),
        ),
    ]
)


def names() -> tuple[str, ...]:
    """Every name that `PolicyConfig.name` may have, sorted."""
    return tuple(sorted(_POLICIES))


def ready(num_tasks: int) -> tuple[str, ...]:
    """The names of the policies that train so many tasks without arguments of their own, sorted."""
    tasks = [f"task {number}" for number in range(num_tasks)]
    found = []
    for name in names():
        try:
            build(PolicyConfig(name=name), tasks, seed=0)
        except ValueError:  # it needs arguments, or more or fewer tasks
            continue
        found.append(name)
    return tuple(found)


def gradient_places(name: str) -> tuple[str, ...]:
    """Where a policy can combine task gradients: "parameters", "representation", or nowhere if it
    weighs losses."""
    entry = _find(name)
    if issubclass(entry.cls, LossPolicy):
        return ()
    return ("parameters", "representation") if entry.allows_representation else ("parameters",)


def check(
    config: PolicyConfig, tasks: Sequence[str], *, max_gradient_norm: float | None = None
) -> None:
    """Finds, before any training, whatever would keep a policy from being made or used.

    Args:
        config: the policy's part of an experiment.
        tasks: names, in the order of the losses.
        max_gradient_norm: the optimiser's part.

    Raises:
        ValueError: an unknown name (with the right one for what other libraries call it), a number
            of tasks that the policy has no use for, an unknown, missing or ill-valued argument,
            `gradients="representation"` where it means nothing, or clipping where there is no
            gradient to clip.
    """
    policy = build(config, tasks, seed=0)
    if policy.makes_update and max_gradient_norm is not None:
        raise ValueError(
            f"optimizer.max_gradient_norm is {max_gradient_norm!r}, but policy {config.name!r} "
            "makes the update itself, from gradients that it brings to one size: there is none to "
            "clip. Set max_gradient_norm to None."
        )


def build(config: PolicyConfig, tasks: Sequence[str], *, seed: int) -> Policy:
    """Makes the policy that a configuration asks for.

    Args:
        config, tasks: as for `check`.
        seed: of the run.

    Raises:
        ValueError: as for `check`.
    """
    entry = _find(config.name)
    _check_tasks(config.name, tasks)
    arguments = resolve(config.name, config.arguments, entry.signature, tasks)
    if config.gradients == "representation":
        if not entry.allows_representation:
            raise ValueError(_no_representation(config.name, entry))
        arguments["at_representation"] = True
    _check_normalization(config, arguments)
    try:
        policy: Policy = entry.cls(tasks, seed=seed, **arguments)
    except ValueError as error:
        raise ValueError(f"policy {config.name!r}: {error}.") from error
    return policy


def _find(name: str) -> Entry:
    check_names(name, {})
    return _POLICIES[name]


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


def _no_representation(name: str, entry: Entry) -> str:
    able = ", ".join(other for other in names() if _POLICIES[other].allows_representation)
    if issubclass(entry.cls, LossPolicy):
        why = "it weighs losses, so it makes no difference where gradients are taken"
    else:
        why = "its method needs task gradients at the parameters"
    return (
        f"policy.gradients is 'representation', but policy {name!r} cannot use it: {why}. Set it "
        f"to 'parameters', or take one of {able}."
    )


def _check_normalization(config: PolicyConfig, arguments: dict[str, Any]) -> None:
    normalization = arguments.get("normalization", "none")
    if config.log_losses and normalization in ("loss", "loss+"):
        raise ValueError(
            f"policy.arguments.normalization of policy {config.name!r} is {normalization!r} with "
            "log_losses on: the gradient of log L is that of L divided by L already; take 'none' "
            "or 'l2', or turn log_losses off."
        )
