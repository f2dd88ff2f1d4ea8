"""A model of the user's own on the samples that it is the likeliest to fail on, before training.

Owns their choice (the first ones, and those with the smallest and the largest integer of an input,
which may lie outside an embedding) and what is said of a failure. What is checked of a model on any
two samples is in `models.own`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from repmtl_ray.config import Experiment
from repmtl_ray.data.cache import CachedSplit, CheckedSplit
from repmtl_ray.data.collate import collate
from repmtl_ray.data.columns import SAMPLE_ID, Inputs
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.runs.build import DTYPES
from repmtl_ray.runs.parameters import evaluating
from repmtl_ray.user_code import failure_of

_NUM_FIRST = 16


def check_samples(
    experiment: Experiment, model: MultiTaskModel, split: CheckedSplit, role: str
) -> None:
    """Runs a model on some samples of every stream of a split, in eval mode.

    Args:
        experiment: its precision is the model's.
        model: on the CPU.
        split: samples that can be read by number; others are passed over.
        role: what messages call the split.

    Raises:
        ValueError: a sample that the model fails on, or whose predictions are not finite.
    """
    if not isinstance(split, CachedSplit):
        return
    dtype = DTYPES[experiment.precision]
    for stream in split.streams:
        stored = split.cached[stream.name]
        why = dict.fromkeys(range(min(_NUM_FIRST, len(stored.block_of))), "")
        why |= {number: f", with {text}" for text, number in stored.extremes}
        chosen = list(why)
        columns = [SAMPLE_ID, *stream.inputs]
        samples = split.rows(stream).fetch(np.array(chosen), columns)
        inputs = collate([(stream, samples)], [], dtype).inputs
        ids = samples[SAMPLE_ID].tolist()
        names = [
            f"sample {sample_id} of the {role} rows{why[number]}"
            for sample_id, number in zip(ids, chosen, strict=True)
        ]
        _check(model.to(dtype=dtype), inputs, names)


def _check(model: MultiTaskModel, inputs: Inputs, names: Sequence[str]) -> None:
    with torch.no_grad(), evaluating(model):
        try:
            predictions = model(inputs)
        except Exception as error:  # whatever the user's code raises
            where = names[_first_failure(model, inputs, len(names))]
            raise ValueError(f"model: it fails on {where}: {failure_of(error)}.") from error
    for task, prediction in predictions.items():
        is_finite = torch.isfinite(prediction).flatten(1).all(dim=1)
        if not is_finite.all():
            where = names[int(is_finite.int().argmin())]
            raise ValueError(
                f"model: before training, the prediction of {task!r} is not finite for {where}; look "
                "for divisions, logarithms and roots of 0, and for inputs that are very large."
            )


def _first_failure(model: MultiTaskModel, inputs: Inputs, num_rows: int) -> int:
    """The first sample that a model fails on without the others; the last one if it is none."""
    for row in range(num_rows):
        pair = [row, row]
        parts = (
            {name: tensor[pair] for name, tensor in inputs.items()}
            if isinstance(inputs, Mapping)
            else inputs[pair]
        )
        try:
            model(parts)
        except Exception:  # noqa: BLE001 -- whatever the user's code raises; the caller reports it
            return row
    return num_rows - 1
