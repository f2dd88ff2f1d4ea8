"""One pass over a split, to named metrics.

Owns the loop, the merge over workers and the metric names `task/metric` and `task/loss`. The
metrics themselves are in `tasks`. They are of the split as a whole: independent of batch size,
number of workers and which worker saw what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import ExperimentError, NonFiniteLossError
from repmtl_ray.data.columns import Batch, inputs_to
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.compute import autocast_to
from repmtl_ray.runs.parameters import evaluating
from repmtl_ray.tasks import Task


@torch.no_grad()
def evaluate(
    model: MultiTaskModel,
    batches: Iterable[Batch],
    tasks: Sequence[Task],
    *,
    workers: Workers = ALONE,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
) -> dict[str, float]:
    """Every task's metrics and mean loss over the split.

    Args:
        model: on `device`, in float64 if that is the precision; put in eval mode, and back as it
            was.
        batches: this worker's part of the split; workers may hold different numbers of batches, or
            none.
        tasks: at least one; each seen in at least one batch of one worker.
        workers: who share the split; they talk at the end alone.
        device: where the model is; batches are moved there.
        precision: of the forward pass; losses are in float32 at least, sums in float64.

    Returns:
        For example {"depth/abs_error": ..., "depth/rel_error": ..., "depth/loss": ...}; the same on
        every worker.

    Raises:
        ExperimentError: a task without valid labels in the whole split; `NonFiniteLossError`: a
            loss over the split that is no number. Both after the merge, alike on every worker.
        ValueError: a label outside the classes.
    """
    device = torch.device(device)
    sums = {
        task.name: torch.zeros(2 + task.num_statistics, dtype=torch.float64, device=device)
        for task in tasks
    }
    collected: dict[str, list[Tensor]] = {task.name: [] for task in tasks}
    with evaluating(model):
        for batch in batches:
            _add_batch(sums, collected, model, batch, tasks, device, precision)
    workers.total_(sums.values())
    results: dict[str, float] = {}
    for task in tasks:
        results |= _task_results(task, sums[task.name], collected[task.name], workers, device)
    return results


def _task_results(
    task: Task, sums: Tensor, collected: list[Tensor], workers: Workers, device: torch.device
) -> dict[str, float]:
    """A task's metrics and mean loss, from its totals over all workers and this worker's rows."""
    loss_sum, count = sums[:2].tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteLossError(
            f"task {task.name!r}: loss over the evaluation split is {loss_sum}"
        )
    try:
        rows = _all_rows(collected, task.num_columns, workers, device)
        values = task.metrics(sums[2:], rows)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    if not count:
        raise ExperimentError(
            f"task {task.name!r}: no label of the evaluation split has a weight above 0; check "
            "the weights of its loss."
        )
    named = {f"{task.name}/{name}": value for name, value in values.items()}
    return {**named, f"{task.name}/loss": loss_sum / count}


def _add_batch(
    sums: dict[str, Tensor],
    collected: dict[str, list[Tensor]],
    model: MultiTaskModel,
    batch: Batch,
    tasks: Sequence[Task],
    device: torch.device,
    precision: str,
) -> None:
    rows = {
        task.name: batch.rows[task.name]
        for task in tasks
        if task.name in batch.rows and len(range(batch.num_rows)[batch.rows[task.name]])
    }
    predictions = predictions_of(model, batch, rows, device, precision)
    for task in tasks:
        if task.name in rows:
            target = batch.targets[task.name].to(device, non_blocking=True)
            sums[task.name] += _sums(task, predictions[task.name], target)
            if task.num_columns:
                collected[task.name].append(task.collected(predictions[task.name], target))


def predictions_of(
    model: MultiTaskModel,
    batch: Batch,
    rows: Mapping[str, slice],
    device: torch.device,
    precision: str,
) -> Mapping[str, Tensor]:
    """What a model gives for the rows of a batch, by task, in a run's precision."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    with autocast_to(precision, device):
        return model(inputs_to(batch.inputs, device, dtype), rows)


def _sums(task: Task, prediction: Tensor, target: Tensor) -> Tensor:
    """Loss sum, number of labels, statistics: what is added up for a task."""
    loss_and_count = torch.stack(task.loss_sum(prediction, target)).double()
    return torch.cat([loss_and_count, task.statistics(prediction, target)])


def _all_rows(
    own: Sequence[Tensor], num_columns: int, workers: Workers, device: torch.device
) -> Tensor | None:
    """What all workers collected, one worker's rows after another's; None of a task that collects
    nothing."""
    if not num_columns:
        return None
    rows = torch.cat([torch.zeros(0, num_columns, dtype=torch.float64, device=device), *own])
    counts = torch.zeros(workers.size, dtype=torch.float64, device=device)
    counts[workers.rank] = len(rows)
    workers.total_([counts])
    first = int(counts[: workers.rank].sum())
    everyone = rows.new_zeros(int(counts.sum()), num_columns)
    everyone[first : first + len(rows)] = rows
    workers.total_([everyone])  # the others' rows are zero here, so the sum is exact
    return everyone
