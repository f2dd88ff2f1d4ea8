"""One optimisation step: forward, task gradients at the representation, penalty, policy, optimiser.

Owns the way of one batch from images to changed parameters. The graph is cut at the representation:
heads and losses are differentiated once a task (twice where the penalty needs it), the encoder once
for all tasks together, or once a task for policies that combine parameter gradients. No Ray:
`Workers` is all it knows of other processes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from repmtl_ray.batch_norm import frozen_statistics
from repmtl_ray.collectives import Workers
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel, representation_module
from repmtl_ray.policies.base import Penalty, Policy, TaskPass
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.saliency import arrange
from repmtl_ray.tasks import Task


class ExperimentError(ValueError):
    """An experiment that cannot be done, or not further; every worker finds so alike, and would
    again."""


class NonFiniteLossError(ExperimentError):
    """A task's loss that no update can be made from: not finite, or not positive where its
    logarithm is trained on."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Everything that stays the same from one step of a run to the next.

    Args:
        model: its parameters are equal on all workers.
        tasks: in the order of the losses.
        policy: combines task gradients.
        policy_name: as users know it, for messages.
        optimizer: over the model's parameters.
        regularizer: Rep-MTL's penalties; both weights 0 turn them off.
        representation: where saliency is taken, as in `ModelConfig`.
        log_losses: train on log L_t.
        max_gradient_norm: or None.
        precision: of the forward pass, as in `Experiment`.
        seed: of the run.
        workers: whose rows together are the global batch.
    """

    model: MultiTaskModel
    tasks: Sequence[Task]
    policy: Policy
    policy_name: str
    optimizer: torch.optim.Optimizer
    regularizer: RepMTL
    representation: str
    log_losses: bool
    max_gradient_norm: float | None
    precision: str
    seed: int
    workers: Workers

    def step(self, batch: Batch, *, global_step: int) -> dict[str, float]:
        """Trains on one global batch, of which `batch` is this worker's part.

        Args:
            batch: on the model's device.
            global_step: steps done before this one; decides dropout's and random policies' draws.

        Returns:
            "<task>/train_loss" (L_t before the step, over the global batch), "rep_mtl/tsr" and
            "rep_mtl/csa" (weighted), "gradient_norm"; equal on every worker.

        Raises:
            NonFiniteLossError: names task, policy and step; parameters are unchanged.
        """
        with cut_at(representation_module(self.model, self.representation)) as cut:
            sums, counts = self._loss_sums(batch, global_step)
        plain_losses, losses, present = self._global_losses(sums, counts, global_step)
        leaf, root = cut.leaf, cut.root
        shared = [
            parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad
        ]
        reachable = shared if self.representation != "encoder" else []
        heads = [list(self.model.heads[task.name].parameters()) for task in self.tasks]
        differentiable = self.regularizer.lambda_tsr > 0 or self.regularizer.lambda_csa > 0
        gradients = [
            torch.autograd.grad(
                loss,
                [leaf, *reachable, *parameters],
                create_graph=differentiable,
                retain_graph=True,
                allow_unused=True,
            )
            for loss, parameters in zip(losses, heads, strict=True)
        ]
        is_after = [
            any(parts[1 + i] is not None for parts in gradients) for i in range(len(reachable))
        ]
        after = list(itertools.compress(reachable, is_after))
        after_ids = {id(parameter) for parameter in after}
        before = [parameter for parameter in shared if id(parameter) not in after_ids]
        saliency = [torch.zeros_like(leaf) if parts[0] is None else parts[0] for parts in gradients]
        penalty: Penalty | None = None
        terms: dict[str, Tensor] = {}
        if differentiable:
            penalty, terms = self._penalty(saliency, batch, leaf, after, heads)
        num_shared = 1 + len(reachable)
        task_pass = TaskPass(
            tasks=tuple(task.name for task in self.tasks),
            plain_losses=plain_losses,
            losses=torch.stack([loss.detach() for loss in losses]),
            log_losses=self.log_losses,
            present=present,
            saliency=[part.detach() for part in saliency],
            head_gradients=[_detached(parts[num_shared:]) for parts in gradients],
            head_parameters=heads,
            shared_before=before,
            shared_after=after,
            shared_after_gradients=[
                _detached(itertools.compress(parts[1:num_shared], is_after)) for parts in gradients
            ],
            encoder_backward=lambda cotangent: _vector_jacobian(root, before, cotangent),
            penalty=penalty,
            workers=self.workers,
        )
        self.policy.backward(task_pass)
        gradient_norm = self._update()
        if self.policy.needs_second_look:
            self._second_look(batch, global_step)
        values = {
            f"{task.name}/train_loss": value
            for task, value in zip(self.tasks, plain_losses.tolist(), strict=True)
        }
        values.update({f"rep_mtl/{name}": term.item() for name, term in terms.items()})
        return {**values, "gradient_norm": gradient_norm}

    def _loss_sums(self, batch: Batch, global_step: int) -> tuple[list[Tensor], list[Tensor]]:
        """Own loss sums and valid counts by task; dropout draws depend on (seed, step, worker)
        alone."""
        torch.manual_seed(
            zlib.crc32(f"step {self.seed} {global_step} {self.workers.rank}".encode())
        )
        height, width = batch.images.shape[-2:]
        device, low_precision = batch.images.device, self.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
            representation = self.model.encoder(batch.images)
            predictions = [
                self.model.predict(
                    task.name, _rows(representation, batch.rows[task.name]), (height, width)
                )
                for task in self.tasks
            ]
        pairs = [
            task.loss_sum(prediction, batch.targets[task.name])
            for task, prediction in zip(self.tasks, predictions, strict=True)
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _global_losses(
        self, sums: Sequence[Tensor], counts: Sequence[Tensor], global_step: int
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Plain losses [T] (detached), the scalars that are trained on, and which tasks have labels
        [T]."""
        totals = torch.stack([count.detach().double() for count in counts])
        self.workers.total_([totals])
        present = totals > 0
        plain, trained = [], []
        for own_sum, count, has_labels in zip(sums, totals, present.tolist(), strict=True):
            loss = self.workers.total(own_sum) / count.clamp(min=1).to(own_sum.dtype)
            loss = (
                loss if has_labels else loss + 1.0
            )  # an absent task: plain loss 1, log loss 0, gradients zero
            plain.append(loss)
            trained.append(loss.log() if self.log_losses else loss)
        plain_losses = torch.stack([loss.detach() for loss in plain])
        for task, value in zip(self.tasks, plain_losses.tolist(), strict=True):
            if not math.isfinite(value) or (self.log_losses and value <= 0):
                wanted = (
                    "a finite number above 0, because log losses are on"
                    if self.log_losses
                    else "a finite number"
                )
                raise NonFiniteLossError(
                    f"task {task.name!r}: loss is {value} at step {global_step + 1} with policy {self.policy_name!r}; expected "
                    f"{wanted}. Lower the learning rate, or look at this task's labels and predictions."
                )
        return plain_losses, trained, present

    def _penalty(
        self,
        saliency: Sequence[Tensor],
        batch: Batch,
        leaf: Tensor,
        after: Sequence[Parameter],
        heads: Sequence[Sequence[Parameter]],
    ) -> tuple[Penalty, dict[str, Tensor]]:
        paired = paired_saliency(saliency, [batch.rows[task.name] for task in self.tasks])
        terms = self.regularizer.terms(arrange(paired, self.model.channel_axis))
        flat_heads = [parameter for parameters in heads for parameter in parameters]
        gradients = torch.autograd.grad(
            torch.stack(list(terms.values())).sum(), [leaf, *after, *flat_heads], allow_unused=True
        )
        by_head: list[list[Tensor | None]] = []
        rest: list[Tensor | None] = list(gradients[1 + len(after) :])
        for parameters in heads:
            by_head.append(rest[: len(parameters)])
            rest = rest[len(parameters) :]
        at_leaf = gradients[0]
        penalty = Penalty(
            representation=torch.zeros_like(leaf) if at_leaf is None else at_leaf,
            shared_after=gradients[1 : 1 + len(after)],
            heads=by_head,
        )
        return penalty, {name: term.detach() for name, term in terms.items()}

    def _update(self) -> float:
        parameters = [
            parameter for parameter in self.model.parameters() if parameter.grad is not None
        ]
        limit = math.inf if self.max_gradient_norm is None else self.max_gradient_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def _second_look(self, batch: Batch, global_step: int) -> None:
        with frozen_statistics(self.model):
            sums, counts = self._loss_sums(batch, global_step)
        totals = torch.stack(
            [*(own.double() for own in sums), *(count.double() for count in counts)]
        )
        self.workers.total_([totals])
        loss_sums, label_counts = totals.chunk(2)
        losses = torch.where(label_counts > 0, loss_sums / label_counts.clamp(min=1), 1.0)
        self.policy.second_look(losses.to(sums[0].dtype))


@dataclass
class Cut:
    """Where the graph was cut: `root` ends the encoder's part, `leaf` (same values) begins the
    heads'."""

    root: Tensor
    leaf: Tensor


@contextlib.contextmanager
def cut_at(module: nn.Module) -> Iterator[Cut]:
    """Cuts the graph at a module's output for the forward passes inside.

    Raises:
        ValueError: the module's output is no tensor, or it did not run exactly once.
    """
    cuts: list[Cut] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"model.representation: {type(module).__name__} gives {type(output).__name__}; expected a tensor."
            )
        precise = output.dtype if output.dtype == torch.float64 else torch.float32
        cuts.append(Cut(output, output.detach().to(precise).requires_grad_()))
        return cuts[-1].leaf

    cut = Cut(torch.empty(0), torch.empty(0))
    handle = module.register_forward_hook(hook)
    try:
        yield cut
    finally:
        handle.remove()
    if len(cuts) != 1:
        raise ValueError(
            f"model.representation: {type(module).__name__} ran {len(cuts)} times in a forward pass; expected once."
        )
    cut.root, cut.leaf = cuts[0].root, cuts[0].leaf


def paired_saliency(saliency: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """The tasks' saliencies with row b of every task side by side.

    Args:
        saliency: T tensors [batch rows, ...]; a task's rows outside its own slice are zero.
        rows: by task. Equal slices (dense tasks): nothing to do. Else (Office: every task has its
            own images) row b of every task's slice is "sample b", as in the benchmarks the paper
            builds on; shorter ones end in zeros, which both penalties leave out.

    Returns:
        [T, longest slice, ...].
    """
    first = rows[0]
    if all(slice_ == first for slice_ in rows) and first == slice(0, saliency[0].shape[0]):
        return torch.stack(list(saliency))
    longest = max(slice_.stop - slice_.start for slice_ in rows)
    parts = []
    for tensor, slice_ in zip(saliency, rows, strict=True):
        own = tensor[slice_]
        missing = own.new_zeros(longest - own.shape[0], *own.shape[1:])
        parts.append(torch.cat([own, missing]))
    return torch.stack(parts)


def _rows(representation: Tensor, rows: slice) -> Tensor:
    return representation if rows == slice(0, representation.shape[0]) else representation[rows]


def _vector_jacobian(
    root: Tensor, parameters: Sequence[Parameter], cotangent: Tensor
) -> list[Tensor]:
    gradients = torch.autograd.grad(
        root, list(parameters), cotangent.to(root.dtype), retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def _detached(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch on another device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(
        images=move(batch.images),
        targets={task: move(target) for task, target in batch.targets.items()},
        rows=batch.rows,
        sample_ids=batch.sample_ids,
    )
