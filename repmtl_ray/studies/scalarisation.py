"""Tuned scalarisation: constant weights of the losses, searched like any hyper-parameter.

Owns the space of weights and the search on the holdout whose best weights a benchmark then trains as a
method. Published comparisons find that it matches most methods (Kurin et al., NeurIPS 2022,
arXiv:2201.04122; Xin et al., NeurIPS 2022, arXiv:2209.11379).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from repmtl_ray import protocols
from repmtl_ray import storage as files
from repmtl_ray.config import Experiment, digest, replace
from repmtl_ray.placement import Placement
from repmtl_ray.run_folder import STUDY_FILE, checked_place
from repmtl_ray.runs.build import selected_tasks
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.search import tune

NAME = "scalarisation"
NUM_WEIGHTS = 64
Changes = dict[str, Any]


def space(num_tasks: int, num_weights: int = NUM_WEIGHTS) -> dict[str, Any]:
    """Weights drawn evenly from the simplex, times the number of tasks, on plain losses or on logs.

    Args:
        num_tasks: of the experiment.
        num_weights: how many the space has; always the same ones.
    """
    from ray import tune as ray_tune

    drawn = num_tasks * np.random.default_rng(0).dirichlet(np.ones(num_tasks), num_weights)
    weights = [[float(f"{weight:.3g}") for weight in row] for row in drawn]
    return {
        "policy.name": "Constant",
        "policy.arguments": ray_tune.choice([{"weights": row} for row in weights]),
        "policy.log_losses": ray_tune.choice([True, False]),
        "regularizer.lambda_tsr": 0.0,
        "regularizer.lambda_csa": 0.0,
    }


def held_out(experiment: Experiment) -> Experiment:
    """The experiment that weights are searched with: no reported number is of its samples."""
    if experiment.data.eval_split == "holdout":
        return experiment
    return replace(experiment, {"data.holdout": protocols.HOLDOUT, "data.eval_split": "holdout"})


def tuned(
    experiment: Experiment,
    num_samples: int,
    *,
    placement: Placement | None = None,
    max_concurrent: int | None = None,
    storage: str | Path | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> Changes:
    """The changes of a method: the weights with the largest delta_p on the holdout.

    The search has a name of its own in the storage, by experiment and number of samples, so that a
    benchmark that is resumed or repeated reads it back.

    Args:
        experiment: what the methods of the benchmark share.
        num_samples: how many weights are tried, one seed each.
        placement, max_concurrent, storage, checkpoints: as for `tune`.

    Raises:
        ValueError: as `tune`; no weights could be trained.
    """
    searched = held_out(experiment)
    name = f"{NAME}-{digest(searched)}-{num_samples}"
    root, name = checked_place(storage, name, "tune", searched)
    result = tune(
        searched,
        space(len(selected_tasks(searched))),
        num_samples=num_samples,
        placement=placement,
        max_concurrent=max_concurrent,
        storage=storage,
        name=name,
        resume=files.exists(f"{root}/{name}/{STUDY_FILE}"),
        checkpoints=checkpoints,
    )
    if result.best is None:
        raise ValueError(
            f"method {NAME!r}: none of the {num_samples} weights could be trained; the reasons are in "
            f"{result.directory}."
        )
    weights = result.best.policy.arguments["weights"]
    log_losses = result.best.policy.log_losses
    print(
        f"scalarisation: weights {weights} on {'log' if log_losses else 'plain'} losses, the best of "
        f"{num_samples} on the holdout",
        flush=True,
    )
    return {
        "policy.name": "Constant",
        "policy.arguments": {"weights": list(weights)},
        "policy.log_losses": log_losses,
        "regularizer.lambda_tsr": 0.0,
        "regularizer.lambda_csa": 0.0,
    }
