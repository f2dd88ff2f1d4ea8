"""What a policy is: it turns one differentiated forward pass into finished gradients, and remembers
its state.

Owns `TaskPass` (what a forward pass left behind) and the two shapes that every policy has:
`LossPolicy` finds one weight a task from the losses, `GradientPolicy` combines task gradients. Both
leave `.grad` complete, totalled over all workers, with the Rep-MTL penalty added. Owns no method:
those are the modules beside this one. No Ray.
"""

from __future__ import annotations

import contextlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.collectives import Workers


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The derivative of the Rep-MTL penalty, own parts.

    Args:
        representation: [*representation.shape].
        after: by parameter in `TaskPass.shared_after`, then by task and head parameter; None where
            it does not depend.
    """

    representation: Tensor
    shared_after: Sequence[Tensor | None]
    heads: Sequence[Sequence[Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class TaskPass:
    """One forward pass, differentiated by task at the representation.

    Args:
        tasks: names, T of them.
        plain_losses: [T], detached, replicated: L_t, means over the global batch's valid labels.
        losses: [T], detached, replicated: what the run trains on; log L_t if `log_losses`, else
            L_t.
        log_losses: see there.
        present: [T] bool, replicated: whether the global batch holds any valid label of the task.
            An absent task has zero gradients, plain loss 1 and log loss 0; a policy neither breaks
            on it nor learns from it.
        saliency: T tensors [*representation.shape], own rows: d losses[t] / d representation.
        head_gradients: by task, by head parameter, own parts: d losses[t] / d parameter.
        head_parameters: by task.
        shared_before: parameters that the representation is computed with.
        shared_after: shared parameters between representation and heads (none when the
            representation is the encoder's output).
        shared_after_gradients: by task, for `shared_after`, own parts.
        encoder_backward: representation cotangent (own rows) -> gradients of `shared_before`, own
            parts; may be called any number of times, each time it costs one encoder backward.
        penalty: None when it is off.
        workers: who takes part.
    """

    tasks: tuple[str, ...]
    plain_losses: Tensor
    losses: Tensor
    log_losses: bool
    present: Tensor
    saliency: Sequence[Tensor]
    head_gradients: Sequence[Sequence[Tensor | None]]
    head_parameters: Sequence[Sequence[Parameter]]
    shared_before: Sequence[Parameter]
    shared_after: Sequence[Parameter]
    shared_after_gradients: Sequence[Sequence[Tensor | None]]
    encoder_backward: Callable[[Tensor], Sequence[Tensor]]
    penalty: Penalty | None
    workers: Workers

    def jacobian(self) -> Tensor:
        """[T, P]: every task's gradient at all shared parameters, global; costs T encoder
        backwards."""
        rows = []
        for saliency, after in zip(self.saliency, self.shared_after_gradients, strict=True):
            parts = [*self.encoder_backward(saliency), *_filled(after, self.shared_after)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        jacobian = torch.stack(rows)
        self.workers.total_([jacobian])
        return jacobian

    def representation_jacobian(self) -> Tensor:
        """[T, own representation size]: every task's gradient at this worker's rows of the
        representation."""
        return torch.stack([saliency.reshape(-1) for saliency in self.saliency])

    def finish_with_weights(self, weights: Tensor) -> None:
        """Leaves the gradient of sum_t weights[t] * losses[t] + penalty; one encoder backward.

        Args:
            weights: [T], replicated.
        """
        cotangent = _combine(weights, self.saliency)
        self._finish(cotangent, None, weights, shared_after_weights=weights)

    def finish_at_representation(self, cotangent: Tensor, head_weights: Tensor) -> None:
        """Leaves the gradient of a combined representation gradient plus penalty; one encoder
        backward.

        Args:
            cotangent: [*representation.shape], own rows.
            head_weights: [T], replicated; heads follow their own task's gradient times this.
        """
        self._finish(cotangent, None, head_weights, shared_after_weights=head_weights)

    def finish_with_direction(self, direction: Tensor, head_weights: Tensor) -> None:
        """Leaves a combined gradient of the shared parameters plus penalty (one encoder backward if
        it is on).

        Args:
            direction: [P], replicated, ordered as `jacobian`'s columns.
            head_weights: [T], replicated.
        """
        self._finish(None, direction, head_weights, shared_after_weights=None)

    def _finish(
        self,
        cotangent: Tensor | None,
        direction: Tensor | None,
        head_weights: Tensor,
        shared_after_weights: Tensor | None,
    ) -> None:
        penalty = self.penalty
        shared = [*self.shared_before, *self.shared_after]
        if penalty is not None:
            cotangent = (
                penalty.representation if cotangent is None else cotangent + penalty.representation
            )
        own = [torch.zeros_like(parameter) for parameter in shared]
        if cotangent is not None:
            _add(own, self.encoder_backward(cotangent))
        own_after = own[len(self.shared_before) :]
        if shared_after_weights is not None:
            for weight, gradients in zip(
                shared_after_weights, self.shared_after_gradients, strict=True
            ):
                _add(own_after, gradients, weight)
        if penalty is not None:
            _add(own_after, penalty.shared_after)
        heads: list[Parameter] = []
        own_heads: list[Tensor] = []
        for task, parameters in enumerate(self.head_parameters):
            own_head = [torch.zeros_like(parameter) for parameter in parameters]
            _add(own_head, self.head_gradients[task], head_weights[task])
            if penalty is not None:
                _add(own_head, penalty.heads[task])
            heads.extend(parameters)
            own_heads.extend(own_head)
        if direction is None or cotangent is not None:
            self.workers.total_([*own, *own_heads])
        else:
            self.workers.total_(own_heads)
        if direction is not None:
            _add(
                own,
                [
                    part.view_as(p)
                    for part, p in zip(_split(direction, shared), shared, strict=True)
                ],
            )
        for parameter, gradient in zip([*shared, *heads], [*own, *own_heads], strict=True):
            parameter.grad = gradient


def _add(
    into: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Tensor | None = None
) -> None:
    for target, gradient in zip(into, gradients, strict=False):
        if gradient is not None:
            target.add_(gradient if weight is None else gradient * weight.to(gradient.dtype))


def _filled(gradients: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def _combine(weights: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total.add_(tensor * weight.to(tensor.dtype))
    return total


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return flat.split([tensor.numel() for tensor in like])


class Policy(ABC):
    """One method's way from task gradients to an update, with everything it remembers.

    The step calls, in this order: `begin_epoch` once an epoch, then for every batch `backward`,
        and, if
    `needs_second_look`, `second_look` after the optimiser's step; `end_epoch` once an epoch.
    `state_dict` may be asked for between any two batches, and a policy loaded from it goes on as if
    it had never stopped.

    Args:
        tasks: names, in the order of the losses.
        seed: of the run; random policies draw from (seed, step), the same on every worker.
    """

    needs_positive_losses: ClassVar[bool] = False
    """The policy reads L_t itself (`TaskPass.plain_losses`), because it takes logarithms or ratios
    on its own."""
    needs_second_look: ClassVar[bool] = False
    """The policy must see the plain losses of the same batch again after the optimiser's step."""

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
        if self.last_weights is None:
            return {}
        return {
            f"weight/{task}": float(w)
            for task, w in zip(self.tasks, self.last_weights, strict=True)
        }


class GradientPolicy(Policy):
    """A policy that combines task gradients, at the shared parameters or at the representation.

    Args:
        tasks, seed: as for every policy.
        at_representation: combine there, at the cost of one encoder backward in all.
    """

    def __init__(self, tasks: Sequence[str], *, seed: int, at_representation: bool = False) -> None:
        super().__init__(tasks, seed=seed)
        self.at_representation = at_representation
