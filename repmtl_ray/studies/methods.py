"""The methods of benchmarks by name: what each changes in the experiment that all share.

Owns the names, and the variants of the paper's studies (table 4, figures 7 and 9). The loss scale is
part of a name, so that the effect of the logarithm is not credited to the penalties: a policy alone
trains on plain losses, as the published rows do, `-log` trains on their logarithms, and so does
Rep-MTL.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from repmtl_ray.conversion import check

Changes = dict[str, Any]

REP_MTL = "Rep-MTL"
LOG = "-log"
LAMBDA = 0.9
"""The centre of the paper's grid, for both penalties."""
STUDIED_LAMBDAS = tuple(round(0.1 + 0.2 * step, 1) for step in range(10))
STUDIED_RATES = tuple(round(1e-4 + 5e-5 * step, 6) for step in range(9))


def method(name: str) -> Changes:
    """The changes of a method.

    Args:
        name: a policy ("UW": plain losses), a policy on log losses ("UW-log"), "Rep-MTL" (EW on log
            losses with both penalties at 0.9), or "Rep-MTL+UW" (the same with another policy).
    """
    if name == REP_MTL or name.startswith(f"{REP_MTL}+"):
        policy = name.removeprefix(REP_MTL).removeprefix("+") or "EW"
        return cell(policy=policy, log_losses=True, tsr=LAMBDA, csa=LAMBDA)
    return cell(policy=name.removesuffix(LOG), log_losses=name.endswith(LOG))


def methods(names: Sequence[str]) -> dict[str, Changes]:
    """The changes of several methods by name, in order.

    Raises:
        ValueError: a name is given twice, or is no name.
    """
    is_right = all(isinstance(name, str) for name in names)
    check(is_right, "methods", names, 'names, for example ["EW", "Rep-MTL"]')
    if len(set(names)) < len(names):
        raise ValueError(f"methods {', '.join(names)}: one is named twice.")
    return {name: method(name) for name in names}


def cell(*, policy: str = "EW", log_losses: bool, tsr: float = 0.0, csa: float = 0.0) -> Changes:
    """The changes that set a policy, its losses and the coefficients of the penalties."""
    return {
        "policy.name": policy,
        "policy.log_losses": log_losses,
        "regularizer.lambda_tsr": tsr,
        "regularizer.lambda_csa": csa,
    }


def ablation() -> dict[str, Changes]:
    """Table 4 as a full cross of log losses, TSR and CSA: eight variants.

    The paper has four, of which the one without penalties trains on plain losses.
    """
    cells = {}
    for log, tsr, csa in itertools.product((False, True), repeat=3):
        parts = ["EW", *(["log"] if log else []), *(["TSR"] if tsr else [])]
        name = " + ".join([*parts, *(["CSA"] if csa else [])])
        cells[name] = cell(log_losses=log, tsr=LAMBDA * tsr, csa=LAMBDA * csa)
    return cells


def sensitivity(which: str, values: Sequence[float] | None = None) -> dict[str, Changes]:
    """Figures 7 and 9: Rep-MTL with several values of one setting.

    Args:
        which: "tsr" or "csa" (figure 7; the other stays at 0.9), or "rate" (figure 9).
        values: of the setting; None takes the paper's: 0.1 to 1.9 in steps of 0.2, or 1e-4 to 5e-4
            in steps of 5e-5.

    Raises:
        ValueError: `which` is another name.
    """
    paths = {
        "tsr": "regularizer.lambda_tsr",
        "csa": "regularizer.lambda_csa",
        "rate": "optimizer.learning_rate",
    }
    if which not in paths:
        raise ValueError(f"sensitivity: {which!r} is not studied; expected tsr, csa or rate.")
    default_values = STUDIED_RATES if which == "rate" else STUDIED_LAMBDAS
    base: Mapping[str, Any] = method(REP_MTL)
    return {
        f"{which} {value:g}": {**base, paths[which]: float(value)}
        for value in (default_values if values is None else values)
    }
