"""How the tasks' gradients of a trained model conflict, over some batches of its training data."""

from __future__ import annotations

import itertools
from statistics import fmean

import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment
from repmtl_ray.data.batches import planned_batches
from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.runs.build import DTYPES, Split, build_stepper, selected_tasks, train_plan
from repmtl_ray.runs.checkpoint import Parts
from repmtl_ray.runs.finite_checks import HostValues

NUM_BATCHES = 8


def task_conflicts(
    experiment: Experiment, parts: Parts, split: Split, device: str
) -> dict[str, float]:
    """Cosines and lengths of the task gradients at the shared parameters, after training.

    Args:
        experiment: that was trained.
        parts: trained; nothing in them changes.
        split: of the training data.
        device: of the parts.

    Returns:
        For each pair of tasks a and b, means over `NUM_BATCHES` batches: "cosine/a ~ b", "conflict/a ~ b"
        (the share of batches whose cosine is below 0) and "length/a ~ b" (the ratio of the norms).
    """
    tasks = selected_tasks(experiment, split.tasks)
    stepper = build_stepper(experiment, tasks, parts, ALONE)
    plan = train_plan(experiment, tasks, split.streams, ALONE)
    batches = planned_batches(
        plan, split.rows, epoch=experiment.epochs, dtype=DTYPES[experiment.precision]
    )
    found: dict[str, list[float]] = {}
    for batch in itertools.islice(batches, NUM_BATCHES):
        here = batch.to(torch.device(device))
        with frozen_statistics(parts.model):
            graph, predictions, losses, derivatives = stepper.differentiated(here, 0)
            values = HostValues(
                plain=losses.plain.cpu(),
                trained=torch.stack([loss.detach() for loss in losses.trained]).cpu(),
                present=losses.present.cpu(),
                reported={},
            )
            seen = stepper.task_pass(here, 0, predictions, values, graph, derivatives, None)
            rows = seen.jacobian().double().cpu()
        norms = rows.norm(dim=1)
        for (i, a), (j, b) in itertools.combinations(enumerate(stepper.task_names), 2):
            size = float(norms[i] * norms[j])
            if size > 0:
                cosine = float(rows[i] @ rows[j]) / size
                ratio = float(norms[i] / norms[j])
                found.setdefault(f"cosine/{a} ~ {b}", []).append(cosine)
                found.setdefault(f"conflict/{a} ~ {b}", []).append(float(cosine < 0))
                found.setdefault(f"length/{a} ~ {b}", []).append(ratio)
    return {name: fmean(values) for name, values in found.items()}
