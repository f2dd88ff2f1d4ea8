"""What the workers of a run do so that it survives: agree where to go on, save in time, end
together.

Owns the use of Ray Train's collectives and of its notice of preemption. Only the first worker
writes; its state is every worker's. A fault that one worker alone can see (its storage, its memory)
becomes one that all end with, so that nobody waits for a worker that has given up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ray.train.collective import broadcast_from_rank_zero

from repmtl_ray import ray_compat, storage, user_code
from repmtl_ray.collectives import Workers
from repmtl_ray.config import Experiment, ExperimentError
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig, CheckpointManager

if TYPE_CHECKING:
    from repmtl_ray.runs.checkpoint import Snapshot

logger = logging.getLogger(__name__)

NO_DEADLINE_S = 120.0
"""How long a notice of preemption without a deadline is taken seriously; Ray's own default."""
FAULT = "fault.txt"
REASONS_BYTES = 900  # what Ray's broadcast is made for


class FaultTolerance:
    """One worker's part in keeping a run; its state is when the last checkpoint was made.

    Args:
        folder: of the run, path or URI.
        checkpoints: when to save and what to keep.
        workers: all of the run.
        notice: looks whether a node of the run is about to go; by default as Ray Train tells it.
    """

    def __init__(
        self,
        folder: str,
        checkpoints: CheckpointConfig,
        workers: Workers,
        *,
        notice: Callable[[], ray_compat.PreemptionNotice | None] = ray_compat.preemption_notice,
    ) -> None:
        self.folder = folder
        self._notice = notice
        self.workers = workers
        self.manager = CheckpointManager(folder, checkpoints)
        self.checkpoint: str | None = None
        self._notice_ends: float | None = None
        self._gave_up_inside = False

    def start(self) -> str | None:
        """The checkpoint that all workers go on from, every byte of it checked by the first.

        Raises:
            ExperimentError: on every worker: an attempt before this one ran out of memory; the
                storage cannot be read.
        """
        found: str | None = None
        fault: str | None = None
        if self.workers.rank == 0:
            try:
                fault = self._earlier_fault()
                found = None if fault else self.manager.latest()
            except ValueError as error:
                fault = str(error)
        found, fault = self._agreed((found, fault))
        if fault:
            raise ExperimentError(fault)
        self.checkpoint = found
        return found

    def after_step(self, snapshot: Snapshot) -> None:
        """Saves inside an epoch if it is time, or if this node or another is about to go.

        From a notice to its deadline every step is saved: whenever the node goes, at most the
        current step is lost. A storage that fails costs what can be saved in this epoch, and no
        more: the end of the epoch decides.
        """
        if self.workers.rank != 0 or self._gave_up_inside:
            return
        global_step = snapshot.progress.global_step
        if not (self.manager.should_save(global_step) or self._noticed()):
            return
        try:
            self.checkpoint = self.manager.write(snapshot.contents())
        except storage.StorageError as error:
            self._gave_up_inside = True
            logger.warning("no checkpoint at step %d: %s", global_step, error)

    def after_epoch(self, snapshot: Snapshot) -> None:
        """Saves; after it, `checkpoint` is the same on every worker.

        Raises:
            ExperimentError: on every worker, when the first could not.
        """
        fault: str | None = None
        self._gave_up_inside = False
        if self.workers.rank == 0:
            try:
                self.checkpoint = self.manager.write(snapshot.contents())
            except storage.StorageError as error:
                fault = str(error)
        self.checkpoint, fault = self._agreed((self.checkpoint, fault))
        if fault:
            raise ExperimentError(fault)

    def best(self) -> str:
        """The best epoch's checkpoint, the same on every worker; call it after an epoch."""
        found, _ = self._agreed((self.manager.best() if self.workers.rank == 0 else None, None))
        assert found is not None, "every epoch leaves a checkpoint, and the best one stays"
        return found

    def fault_of(self, error: Exception, experiment: Experiment) -> str | None:
        """What to tell a user of an error that every restart would find again, noted as by `fault`;
        None of any other."""
        from repmtl_ray.data.plan import DataError  # needs torch, which Tune's driver does not

        if isinstance(error, DataError):
            return self.fault(str(error))
        if is_out_of_memory(error):
            return self.out_of_memory(error, experiment)
        # Of other types, for example of a tracking service's client, the next attempt may find none.
        if user_code.is_from_user(error) and type(error).__module__ == "builtins":
            return self.fault(f"your code failed: {user_code.failure_of(error)}.")
        return None

    def out_of_memory(self, error: BaseException, experiment: Experiment) -> str:
        """What to tell a user; noted as by `fault`."""
        first = str(error).strip().partition("\n")[0][:300]
        message = (
            f"out of memory with batch_size {experiment.batch_size} over {self.workers.size} workers ({first or 'no details'}); "
            "take a smaller batch or model, or more workers."
        )
        return self.fault(message)

    def fault(self, message: str) -> str:
        """A fault that one worker found and that every restart would find again.

        Written down for the workers of the next attempt, which all end with it.
        """
        if self.workers.size > 1:
            storage.write(f"{self.folder}/{FAULT}", message.encode())
        return message

    def _earlier_fault(self) -> str | None:
        """Told once: who starts the run again wants it tried again."""
        note = f"{self.folder}/{FAULT}"
        try:
            message = storage.read(note).decode()
        except FileNotFoundError:
            return None
        storage.remove(note)
        return message

    def _agreed(self, found: tuple[str | None, str | None]) -> tuple[str | None, str | None]:
        """The first worker's answer."""
        path, fault = found
        if self.workers.size == 1:
            return found
        return broadcast_from_rank_zero((path, fault and fault[:REASONS_BYTES]))

    def _noticed(self) -> bool:
        """Whether Ray has said that a node of this run goes, and its time has not passed."""
        notice = self._notice()
        if notice is None:
            return False
        if self._notice_ends is None:
            logger.warning("a node of this run is about to go: saving after every step")
            self._notice_ends = notice.deadline_s or time.time() + NO_DEADLINE_S
        return time.time() < self._notice_ends


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, of Python, or of PyTorch's CPU allocator, which has no class of its own."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
