"""The official split, read once with the chosen epoch's weights.

Owns the final evaluation of a run whose epochs were judged by another split (`protocols.py`). Every
worker calls it at the same place. No Ray.
"""

from __future__ import annotations

import json

import torch

from repmtl_ray import storage
from repmtl_ray.collectives import Workers
from repmtl_ray.config import Experiment
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.runs import checkpoint, checkpoint_manager, loop
from repmtl_ray.runs.build import Split


def evaluate_best(
    experiment: Experiment,
    model: MultiTaskModel,
    split: Split,
    *,
    directory: str,
    best: str,
    workers: Workers,
    device: torch.device,
) -> dict[str, float]:
    """The official split, read with the weights of the run's best epoch.

    Args:
        experiment: of the run.
        model: of the run; has the best epoch's weights afterwards.
        split: the official one.
        directory: path or URI of the run.
        best: the checkpoint of the best epoch.
        workers, device: as in `loop.run`.

    Returns:
        As `evaluate`, and "epoch"; kept beside the run, and read from there when it is asked for
        again.
    """
    found = checkpoint_manager.read_final(directory)
    if found is not None:
        return found
    model.load_state_dict(checkpoint.read_state(best)["model"])
    tasks = loop.selected_tasks(experiment, split.tasks)
    metrics = loop.evaluate_split(experiment, tasks, model, split, workers=workers, device=device)
    found = {"epoch": float(checkpoint_manager.read_marker(best).epochs_done), **metrics}
    if workers.rank == 0:
        storage.write_text(
            f"{directory}/{checkpoint_manager.FINAL_FILE}", json.dumps(found, indent=2) + "\n"
        )
    return found
