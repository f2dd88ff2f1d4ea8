"""What a policy is: it turns one differentiated forward pass into finished gradients, and remembers
its state.

Owns the shapes that policies have: `Policy`, `LossPolicy`, which finds one weight a task from the
losses, and `GradientPolicy`, which combines task gradients. All leave `.grad` complete, totalled
over all workers, with the Rep-MTL penalty added; the ways to do so are in `task_pass.py`. Owns no
method: those are the modules beside this one. No Ray.
"""

from __future__ import annotations

import contextlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.task_pass import TaskPass


def weight_metrics(tasks: Sequence[str], weights: Tensor | None) -> dict[str, float]:
    """[T] weights as `Policy.metrics` names them; none before the first step."""
    if weights is None:
        return {}
    return {f"weight/{task}": w for task, w in zip(tasks, weights.tolist(), strict=True)}


class Policy(ABC):
    """One method's way from task gradients to an update, with everything it remembers.

    The step calls, in this order: `begin_epoch` once an epoch, then for every batch `backward`,
    and, if `needs_second_look`, `second_look` after the optimiser's step; `end_epoch` once an
    epoch. `state_dict` may be asked for between any two batches, and a policy loaded from it goes
    on as if it had never stopped.

    Args:
        tasks: names, in the order of the losses.
        seed: of the run; random policies draw from (seed, step), the same on every worker.
    """

    needs_positive_losses: ClassVar[bool] = False
    """The policy reads L_t itself (`TaskPass.plain_losses`), because it takes logarithms or ratios
    on its own."""
    needs_second_look: ClassVar[bool] = False
    """The policy must see the plain losses of the same batch again after the optimiser's step."""
    needs_parts: ClassVar[bool] = False
    """The policy asks for `TaskPass.part_gradients`; the heads' graph is kept for it."""
    makes_update: ClassVar[bool] = False
    """What the policy leaves in `.grad` is no gradient but the update that a learning rate of 1
    subtracts. The step subtracts it times the optimiser's learning rate of that moment, schedule
    included, in place of the optimiser's own step; weight decay is AdamW's, decoupled. There is no
    gradient left to clip, so `max_gradient_norm` is refused."""
    allows_representation: ClassVar[bool] = False
    """The policy can combine task gradients at the representation too (`at_representation`)."""

    def __init__(self, tasks: Sequence[str], *, seed: int) -> None:
        self.tasks = tuple(tasks)
        self.seed = seed
        self.step = 0

    @abstractmethod
    def backward(self, task_pass: TaskPass) -> None:
        """Leaves finished `.grad` on every parameter of the pass."""

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 - most policies do not care
        """Called before an epoch's first batch; `epoch` counts from 0."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after an epoch's last batch."""

    def second_look(self, plain_losses: Tensor) -> None:  # noqa: B027
        """Called after the optimiser's step with [T] losses of the same batch, when
        `needs_second_look`."""

    def metrics(self) -> dict[str, float]:
        """What a user wants to watch, for example {"weight/depth": 0.7}; names as `policy/<key>` in
        results."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only (loadable with weights_only=True)."""
        return {"step": self.step, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.step = state.pop("step")
        self._load_state(state)

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(
                f"policy {type(self).__name__} keeps no state, found {sorted(state)} in the checkpoint."
            )

    @final
    @contextlib.contextmanager
    def _drawing(self, device: torch.device) -> Iterator[None]:
        """Random draws inside depend on (seed, step) alone: equal on all workers and after a
        restart."""
        devices = [device] if device.type == "cuda" else []
        draw_seed = zlib.crc32(f"policy {self.seed} {self.step}".encode())
        with torch.random.fork_rng(devices=devices):
            # torch.manual_seed would seed every CUDA device too, and only the forked ones are put
            # back.
            torch.default_generator.manual_seed(draw_seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(draw_seed)
            yield


class LossPolicy(Policy):
    """A policy that weighs losses; one encoder backward."""

    def __init__(self, tasks: Sequence[str], *, seed: int) -> None:
        super().__init__(tasks, seed=seed)
        self.last_weights: Tensor | None = None

    @abstractmethod
    def weights(self, losses: Tensor, present: Tensor) -> Tensor:
        """[T] weights for the gradients of `losses`.

        Args:
            losses: [T], detached; plain if `needs_positive_losses`.
            present: [T] bool, as in `TaskPass`.
        """

    @final
    def backward(self, task_pass: TaskPass) -> None:
        if self.needs_positive_losses:
            weights = self.weights(task_pass.plain_losses, task_pass.present)
            if task_pass.log_losses:  # the pass holds gradients of log L_t, and d L = L d log L
                weights = weights * task_pass.plain_losses
        else:
            weights = self.weights(task_pass.losses, task_pass.present)
        self.last_weights = weights.detach()
        task_pass.finish_with_weights(self.last_weights)
        self.step += 1

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.last_weights)


class GradientPolicy(Policy):
    """A policy that combines task gradients, at the shared parameters or at the representation.

    Args:
        tasks, seed: as for every policy.
        at_representation: combine there, at the cost of one encoder backward in all.
    """

    def __init__(self, tasks: Sequence[str], *, seed: int, at_representation: bool = False) -> None:
        super().__init__(tasks, seed=seed)
        self.at_representation = at_representation

    def _head_weights(self, task_pass: TaskPass) -> Tensor:
        """[T] weights of the heads' own gradients; asked for after the shared ones are combined."""
        return torch.ones(len(self.tasks), dtype=torch.float64)
