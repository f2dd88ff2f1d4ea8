"""Spaces over Rep-MTL's coefficients, temperature, policy and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import tune

PAPER_LAMBDAS = (0.7, 0.9, 1.1, 1.3, 1.5)
SENSITIVITY_LAMBDAS = tuple(round(0.1 + 0.2 * i, 1) for i in range(10))
TSR, CSA, TAU = "regularizer.lambda_tsr", "regularizer.lambda_csa", "regularizer.temperature"


def paper_grid() -> dict[str, Any]:
    """The coefficient grid of the paper's implementation details: {0.7, ..., 1.5} for both, 25
    trials."""
    return {TSR: tune.grid_search(list(PAPER_LAMBDAS)), CSA: tune.grid_search(list(PAPER_LAMBDAS))}


def sensitivity(which: str = "tsr") -> dict[str, Any]:
    """One line of the paper's sensitivity study (figure 7): one coefficient from 0.1 to 1.9, the
    other at 0.9; 10 trials.

    Args:
        which: "tsr" or "csa", the coefficient that varies.
    """
    if which not in ("tsr", "csa"):
        raise ValueError(f"sensitivity: which is {which!r}; expected 'tsr' or 'csa'.")
    varies, stays = (TSR, CSA) if which == "tsr" else (CSA, TSR)
    return {varies: tune.grid_search(list(SENSITIVITY_LAMBDAS)), stays: 0.9}


def joint(names: Sequence[str] = ("EW", "UW", "GLS", "RLW", "DWA", "IMTL-L")) -> dict[str, Any]:
    """Coefficients, temperature, log losses, learning rate and policy together; ours, the paper
    tunes them apart.

    The ranges are those of the paper's studies (figures 7 and 9), with 0, which turns a penalty
    off, included.

    Args:
        names: policies to choose from.
    """
    return {
        "policy.name": tune.choice(list(names)),
        "policy.log_losses": tune.choice([True, False]),
        TSR: tune.uniform(0.0, 1.9),
        CSA: tune.uniform(0.0, 1.9),
        TAU: tune.loguniform(0.1, 2.0),
        "optimizer.learning_rate": tune.loguniform(1e-4, 5e-4),
    }


def policies(names: Sequence[str] = ()) -> dict[str, Any]:
    """Every policy once, with the experiment's own coefficients.

    Args:
        names: which; none means all that train two tasks without arguments of their own.
    """
    chosen = list(names)
    if not chosen:
        from repmtl_ray import policies as known  # loads torch and TorchJD

        chosen = list(known.ready(2))
    return {"policy.name": tune.grid_search(chosen)}


def bounded(names: Sequence[str] = ("EW", "UW")) -> dict[str, Any]:
    """The bounded penalty: its share of the tasks' gradient, to the encoder alone; ours, not the
    paper's (docs/methods.md).

    Args:
        names: policies to choose from.
    """
    return {
        "policy.name": tune.choice(list(names)),
        "regularizer.share": tune.loguniform(0.05, 0.3),
        "regularizer.through": "encoder",
        CSA: tune.choice([0.0, 0.9]),
    }


def bounded_grid() -> dict[str, Any]:
    """Three shares of `bounded`, each of which can be trained with several seeds; ours."""
    return {
        "regularizer.share": tune.grid_search([0.05, 0.1, 0.3]),
        "regularizer.through": "encoder",
    }


def mid_run() -> dict[str, Any]:
    """What population based training changes in mid-run: the share of `bounded` and the temperature;
    ours."""
    return {
        "regularizer.share": tune.loguniform(0.05, 0.3),
        "regularizer.through": "encoder",
        TAU: tune.loguniform(0.1, 2.0),
    }


def scalarisation(num_tasks: int = 2) -> dict[str, Any]:
    """Constant weights drawn evenly from the simplex, on plain losses or on logs, without penalties;
    ours (repmtl_ray/studies/scalarisation.py).

    Args:
        num_tasks: of the experiment.
    """
    from repmtl_ray.studies.scalarisation import space  # loads torch

    return space(num_tasks)


def small(names: Sequence[str] = ("EW", "UW", "GLS")) -> dict[str, Any]:
    """A coarse version of `joint` at a fixed learning rate, for demonstrations of a few trials."""
    return {
        "policy.name": tune.choice(list(names)),
        "policy.log_losses": tune.choice([True, False]),
        TSR: tune.choice([0.0, 0.1, 0.5, 0.9]),
        CSA: tune.choice([0.0, 0.1, 0.5, 0.9]),
        TAU: tune.choice([0.5, 1.0]),
    }
