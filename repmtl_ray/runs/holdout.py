"""Batches of the holdout split during training, for policies that are steered by them.

Owns which batch belongs to which step. A batch follows from the seed and the step alone, so a run
that is continued gets the same ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch

from repmtl_ray.collectives import Workers
from repmtl_ray.config import Experiment, ExperimentError
from repmtl_ray.data.batches import train_batches
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.sampler import steps_per_epoch
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
