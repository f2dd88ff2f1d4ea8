"""What one differentiated forward pass leaves to a policy, and the ways to finish it.

Owns `TaskPass`: task gradients at the representation, at all shared parameters, at the last shared
layer or of sub-batches, and the methods that leave finished `.grad`, totalled over all
workers, with the Rep-MTL penalty added. Owns no method of combining. No Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.collectives import Workers
from repmtl_ray.penalties import scale_for_share
from repmtl_ray.policies.gradient_lists import add_, combined, filled, last_weight, stacked
from repmtl_ray.policies.look import Look


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """The derivative of the Rep-MTL penalty, own parts; None where it does not depend.

    Args:
        representation: [*representation.shape].
        downstream: by parameter in `TaskPass.downstream_parameters`.
        heads: by task, by head parameter.
        share: all of it is scaled by one factor, so that it has this share of the norm of what the
            policy makes of the task gradients: at the representation, or for policies that combine
            gradients of parameters at the upstream parameters. None leaves it as it is.
    """

    representation: Tensor
    downstream: Sequence[Tensor | None]
    heads: Sequence[Sequence[Tensor | None]]
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskGradients:
    """Each task's derivative down to the representation, own parts.

    Args:
        saliency: T tensors [*representation.shape], own rows.
        downstream_gradients: by task, by parameter in `TaskPass.downstream_parameters`.
    """

    saliency: Sequence[Tensor]
    downstream_gradients: Sequence[Sequence[Tensor | None]]


class EncoderBackward(Protocol):
    """From a representation cotangent (own rows) to gradients of shared parameters, own parts.

    May be called any number of times; each costs one encoder backward, or the part of it behind the
    named parameters.
    """

    def __call__(
        self, cotangent: Tensor, parameters: Sequence[Parameter] | None = None
    ) -> Sequence[Tensor]:
        """By parameter; `parameters` are some of `TaskPass.upstream_parameters`, None means all."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskPass:
    """One forward pass, differentiated by task at the representation.

    Args:
        tasks: names, T of them.
        plain_losses: [T], on the CPU, replicated: L_t, means over the global batch's valid labels.
        losses: [T], on the CPU, replicated: what the run trains on; log L_t if `log_losses`, else
            L_t.
        log_losses: see there.
        present: [T] bool, on the CPU, replicated: whether the global batch holds any valid label of the task.
            An absent task has zero gradients, plain loss 1 and log loss 0; a policy neither breaks
            on it nor learns from it.
        representation: [rows, ...], detached, own rows.
        saliency: T tensors [*representation.shape], own rows: d losses[t] / d representation.
        head_gradients: by task, by head parameter, own parts: d losses[t] / d parameter.
        head_parameters: by task.
        upstream_parameters: shared parameters that the representation is computed with.
        downstream_parameters: shared parameters between representation and heads (none when the
            representation is the encoder's output).
        downstream_gradients: by task, for `downstream_parameters`, own parts.
        encoder_backward: see there.
        sub_batch_gradients: number of sub-batches -> each one's task gradients. Row r of the global
            batch belongs to sub-batch r modulo their number, whichever worker holds it. The losses
            of a sub-batch are means over its own valid labels; a task without any there has zero
            gradients. All sub-batches come from this one forward pass, so they share batch
            statistics. Costs a backward through the heads for each sub-batch and task; nothing
            until it is called. Only for policies that say so (`Policy.needs_sub_batches`).
        head_derivatives: task, direction [*representation.shape] (own rows) -> the derivative of
            the inner product of the task's saliency and the direction by the parameters of its
            head, own parts. Only for policies that say so (`Policy.needs_head_derivatives`).
        look: as `policies/look.py` says. Every look costs a forward pass and, with its gradients, what those cost.
        learning_rate: the optimiser's at this moment.
        losses_at: moves as for `look` -> [T] plain losses of the batch there, in eval mode,
            replicated; one forward pass without a graph.
        penalty: None when it is off.
        workers: who takes part.
    """

    tasks: tuple[str, ...]
    plain_losses: Tensor
    losses: Tensor
    log_losses: bool
    present: Tensor
    representation: Tensor
    saliency: Sequence[Tensor]
    head_gradients: Sequence[Sequence[Tensor | None]]
    head_parameters: Sequence[Sequence[Parameter]]
    upstream_parameters: Sequence[Parameter]
    downstream_parameters: Sequence[Parameter]
    downstream_gradients: Sequence[Sequence[Tensor | None]]
    encoder_backward: EncoderBackward
    sub_batch_gradients: Callable[[int], Sequence[TaskGradients]]
    head_derivatives: Callable[[int, Tensor], Sequence[Tensor | None]]
    look: Look[TaskPass]
    losses_at: Callable[[Sequence[Tensor]], Tensor]
    learning_rate: float
    penalty: Penalty | None
    workers: Workers

    @property
    def shared(self) -> list[Parameter]:
        """Shared parameters, in the order of the columns of `jacobian`."""
        return [*self.upstream_parameters, *self.downstream_parameters]

    @property
    def parameters(self) -> list[Parameter]:
        """`shared`, then the heads' by task."""
        return [*self.shared, *(parameter for head in self.head_parameters for parameter in head)]

    @property
    def gradients(self) -> TaskGradients:
        """Those of the whole batch."""
        return TaskGradients(saliency=self.saliency, downstream_gradients=self.downstream_gradients)

    def shared_gradients(self) -> list[list[Tensor]]:
        """By task, by parameter of `shared`, own parts; T encoder backwards."""
        return [
            [*self.encoder_backward(saliency), *filled(after, self.downstream_parameters)]
            for saliency, after in zip(self.saliency, self.downstream_gradients, strict=True)
        ]

    def with_gradients(
        self,
        shared_gradients: Sequence[Sequence[Tensor]],
        head_gradients: Sequence[Sequence[Tensor | None]],
        *,
        with_penalty: bool = True,
    ) -> TaskPass:
        """This pass with other task gradients, for a policy that cannot tell the difference unless
        it works at the representation.

        Args:
            shared_gradients: by task, by parameter of `shared`, own parts.
            head_gradients: by task, by head parameter, own parts.
            with_penalty: whether it has this pass's penalty, or none.
        """
        penalty = self.penalty if with_penalty else None
        if penalty is not None:
            own = self._own_gradients(None, self.gradients, None, None)[: len(self.shared)]
            nothing = torch.zeros_like(penalty.representation)
            penalty = replace(penalty, representation=nothing, downstream=own)
        return replace(
            self,
            upstream_parameters=[],
            downstream_parameters=self.shared,
            downstream_gradients=shared_gradients,
            head_gradients=head_gradients,
            encoder_backward=lambda cotangent, parameters=None: [],
            penalty=penalty,
        )

    def jacobian(self, gradients: TaskGradients | None = None) -> Tensor:
        """[T, P]: every task's gradient at all shared parameters, global; T encoder backwards.

        Args:
            gradients: a sub-batch's; None means the whole batch's.
        """
        of = self.gradients if gradients is None else gradients
        rows = (
            [*self.encoder_backward(saliency), *filled(after, self.downstream_parameters)]
            for saliency, after in zip(of.saliency, of.downstream_gradients, strict=True)
        )
        jacobian = stacked(rows, len(self.tasks))
        self.workers.total_([jacobian])
        return jacobian

    def direction(self, weights: Tensor) -> Tensor:
        """[P]: the gradient of sum_t weights[t] * losses[t] at all shared parameters, global; one
        encoder backward.

        Args:
            weights: [T], replicated.
        """
        after = [torch.zeros_like(parameter) for parameter in self.downstream_parameters]
        for weight, gradients in zip(weights, self.downstream_gradients, strict=True):
            add_(after, gradients, weight)
        parts = [*self.encoder_backward(combined(weights, self.saliency)), *after]
        direction = torch.cat([part.reshape(-1) for part in parts])
        self.workers.total_([direction])
        return direction

    def last_layer_jacobian(self) -> Tensor:
        """[T, size]: every task's gradient at the weight of the last shared layer, global.

        That is the last shared parameter with two axes at least, in the order of registration (a
        kernel or a matrix: no bias, no normalisation). The backward passes end there, so all T
        together cost less than one encoder backward.
        """
        last = last_weight(self.downstream_parameters or self.upstream_parameters)
        if self.downstream_parameters:
            index = [parameter is last for parameter in self.downstream_parameters].index(True)
            rows = [
                filled(after, self.downstream_parameters)[index]
                for after in self.downstream_gradients
            ]
        else:
            rows = [self.encoder_backward(saliency, [last])[0] for saliency in self.saliency]
        jacobian = torch.stack([row.reshape(-1) for row in rows])
        self.workers.total_([jacobian])
        return jacobian

    def representation_jacobian(self) -> Tensor:
        """[T, own representation size]: every task's gradient at this worker's rows of the
        representation."""
        return torch.stack([saliency.reshape(-1) for saliency in self.saliency])

    def global_head_gradients(self) -> list[list[Tensor]]:
        """By task, by head parameter, totalled over workers."""
        heads = [
            [gradient.clone() for gradient in filled(gradients, parameters)]
            for gradients, parameters in zip(self.head_gradients, self.head_parameters, strict=True)
        ]
        self.workers.total_(gradient for head in heads for gradient in head)
        return heads

    def global_penalty_gradient(self) -> list[Tensor] | None:
        """The penalty's gradient by parameter (`shared`, then heads by task), totalled over
        workers, before `Penalty.share`; None when it is off. One encoder backward."""
        if self.penalty is None:
            return None
        own = self._own_gradients(None, self.gradients, None, None)
        self.workers.total_(own)
        return own

    def finish_with_weights(
        self,
        weights: Tensor,
        *,
        head_weights: Tensor | None = None,
        gradients: TaskGradients | None = None,
    ) -> None:
        """Leaves the gradient of sum_t weights[t] * losses[t] + penalty; one encoder backward.

        Args:
            weights: [T], replicated.
            head_weights: [T], replicated; None means `weights`. Heads always follow the losses of
                the whole batch.
            gradients: a sub-batch's, for the shared parameters; None means the whole batch's.
        """
        of = self.gradients if gradients is None else gradients
        own = self._own_gradients(
            combined(weights, of.saliency),
            of,
            weights,
            weights if head_weights is None else head_weights,
        )
        self.workers.total_(own)
        self._leave(own)

    def finish_at_representation(self, cotangent: Tensor, head_weights: Tensor) -> None:
        """Leaves the gradient of a combined representation gradient plus penalty; one encoder
        backward.

        Args:
            cotangent: [*representation.shape], own rows.
            head_weights: [T], replicated; heads follow their own task's gradient times this.
        """
        own = self._own_gradients(cotangent, self.gradients, head_weights, head_weights)
        self.workers.total_(own)
        self._leave(own)

    def finish_with_direction(
        self,
        direction: Tensor,
        head_weights: Tensor,
        *,
        added_to_heads: Sequence[Tensor] | None = None,
    ) -> None:
        """Leaves a combined gradient of the shared parameters plus penalty (one encoder backward if
        it is on).

        Args:
            direction: [P], replicated, ordered as `jacobian`'s columns.
            head_weights: [T], replicated.
            added_to_heads: by head parameter, replicated; None adds nothing.
        """
        shared = self.shared
        parts = direction.split([parameter.numel() for parameter in shared])
        if self.penalty is not None and self.penalty.share is not None:
            own = self._with_share_of(parts, self.penalty.share, head_weights)
        else:
            own = self._own_gradients(None, self.gradients, None, head_weights)
            self.workers.total_(own if self.penalty is not None else own[len(shared) :])
        for target, part in zip(own, parts, strict=False):
            target.add_(part.view_as(target))
        if added_to_heads is not None:
            add_(own[len(shared) :], added_to_heads)
        self._leave(own)

    def finish_with_update(self, updates: Sequence[Tensor]) -> None:
        """Leaves a finished update; for policies that say so (`Policy.makes_update`).

        Args:
            updates: by parameter (`shared`, then heads by task), replicated; what a learning rate
                of 1 subtracts, the penalty's share included.
        """
        self._leave(updates)

    def _with_share_of(
        self, direction: Sequence[Tensor], share: float, head_weights: Tensor
    ) -> list[Tensor]:
        """By parameter, replicated: the bounded penalty's gradient, and for heads the tasks' too.

        Args:
            direction: by parameter in `shared`, replicated.
            share: of its norm at the upstream parameters that the penalty has there.
            head_weights: [T], replicated.
        """
        total = self.global_penalty_gradient()
        assert total is not None
        num_upstream = len(self.upstream_parameters)
        scale = scale_for_share(share, direction[:num_upstream], total[:num_upstream])
        for gradient in total:
            gradient.mul_(scale)
        rest = total[len(self.shared) :]
        for weight, gradients in zip(head_weights, self.global_head_gradients(), strict=True):
            add_(rest[: len(gradients)], gradients, weight)
            rest = rest[len(gradients) :]
        return total

    def _own_gradients(
        self,
        cotangent: Tensor | None,
        of: TaskGradients,
        after_weights: Tensor | None,
        head_weights: Tensor | None,
    ) -> list[Tensor]:
        """By parameter, own parts, the penalty's added; what is None counts as zero."""
        penalty = self.penalty
        own = [torch.zeros_like(parameter) for parameter in self.parameters]
        num_before, num_shared = len(self.upstream_parameters), len(self.shared)
        after, rest = own[num_before:num_shared], own[num_shared:]
        scale: Tensor | None = None
        if penalty is not None:
            at = penalty.representation
            if penalty.share is not None and cotangent is not None:
                scale = scale_for_share(penalty.share, [cotangent], [at], workers=self.workers)
                at = at * scale
            cotangent = at if cotangent is None else cotangent + at
            add_(after, penalty.downstream, scale)
        if cotangent is not None:
            add_(own[:num_before], self.encoder_backward(cotangent))
        if after_weights is not None:
            for weight, gradients in zip(after_weights, of.downstream_gradients, strict=True):
                add_(after, gradients, weight)
        for task, parameters in enumerate(self.head_parameters):
            head, rest = rest[: len(parameters)], rest[len(parameters) :]
            if head_weights is not None:
                add_(head, self.head_gradients[task], head_weights[task])
            if penalty is not None:
                add_(head, penalty.heads[task], scale)
        return own

    def _leave(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
