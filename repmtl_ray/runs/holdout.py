"""What is held out: batches that steer a policy during training, and a part to choose settings by.

Owns which batch belongs to which step. A batch follows from the seed and the step alone, so a run
that is continued gets the same ones. Which samples `data.holdout` holds out is in `data/stream.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repmtl_ray.collectives import Workers
from repmtl_ray.config import Experiment, ExperimentError
from repmtl_ray.data.batches import Rows, train_batches
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.sampler import Indices, steps_per_epoch
from repmtl_ray.data.stream import Stream
from repmtl_ray.runs.build import DTYPES, Split
from repmtl_ray.tasks import Task


class HoldoutBatches:
    """Step -> this worker's part of a batch of the holdout split, on its device.

    The split is read epoch by epoch in orders of its own, without augmentation. A batch is as large
    as a training batch.

    Args:
        experiment, tasks: what is trained.
        split: the holdout.
        workers: all that take part.
        device: of this worker.

    Raises:
        ExperimentError: the split does not fill one batch.
    """

    def __init__(
        self,
        experiment: Experiment,
        tasks: Sequence[Task],
        split: Split,
        *,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self._experiment, self._tasks, self._split = experiment, tasks, split
        self._workers, self._device = workers, device
        try:
            self._num_batches = steps_per_epoch(split.streams, experiment.batch_size)
        except ValueError as error:
            raise ExperimentError(
                f"policy {experiment.policy.name!r} is steered by batches of the holdout split: "
                f"{error} Raise data.holdout, lower batch_size, or take outer='train'."
            ) from error
        self._batches: Iterator[Batch] = iter(())
        self._next_step = -1  # of the batch that `_batches` gives next
        self._last: tuple[int, Batch] | None = None

    def __call__(self, global_step: int) -> Batch:
        """The batch of a step.

        Args:
            global_step: number of steps before it.
        """
        if self._last is None or self._last[0] != global_step:
            lap, place = divmod(global_step, self._num_batches)
            if self._next_step != global_step or place == 0:
                self._batches = self._lap(lap, place)
            self._last = (global_step, next(self._batches).to(self._device))
            self._next_step = global_step + 1
        return self._last[1]

    def _lap(self, lap: int, first_step: int) -> Iterator[Batch]:
        experiment = self._experiment
        return train_batches(
            self._split.streams,
            self._split.rows,
            tasks=[task.name for task in self._tasks],
            batch_size=experiment.batch_size,
            seed=zlib.crc32(f"holdout {experiment.seed}".encode()),
            epoch=lap,
            first_step=first_step,
            workers=self._workers,
            augment=False,
            pairing=experiment.data.pairing,
            dtype=DTYPES[experiment.precision],
        )


def without_a_part(split: Split, fraction: float) -> tuple[Split, Split]:
    """A split that is open, cut into a rest to train on and a part to choose by; always the same.

    Args:
        split: its rows stay where they are.
        fraction: of each stream's samples that the part has, rounded.
    """
    kept: tuple[list[Stream], dict[str, Rows]] = ([], {})
    part: tuple[list[Stream], dict[str, Rows]] = ([], {})
    for stream in split.streams:
        order = np.random.default_rng(0).permutation(stream.num_samples)
        cut = round((1 - fraction) * len(order))
        for (streams, rows), numbers in ((kept, order[:cut]), (part, order[cut:])):
            numbers = np.sort(numbers)
            classes = stream.classes
            named = None if classes is None else tuple(classes[n] for n in numbers)
            streams.append(replace(stream, num_samples=len(numbers), classes=named))
            rows[stream.name] = _PartOfRows(split.rows[stream.name], numbers)
    first, second = (
        replace(split, streams=tuple(streams), rows=rows) for streams, rows in (kept, part)
    )
    return first, second


class _PartOfRows:
    """Some rows, under new numbers from 0."""

    def __init__(self, rows: Rows, numbers: NDArray[np.int64]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def fetch(
        self, indices: Indices, columns: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        return self._rows.fetch(self._numbers[np.asarray(indices)], columns)
