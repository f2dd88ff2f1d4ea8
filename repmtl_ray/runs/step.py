"""One optimisation step: forward, task gradients at the representation, penalty, policy, optimiser.

Owns the way of one batch from images to changed parameters. The graph is cut at the representation:
heads and losses are differentiated once a task (twice where the penalty needs it), the encoder once
for all tasks together, or once a task for policies that combine parameter gradients. No Ray:
`Workers` is all it knows of other processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from repmtl_ray.collectives import Workers
from repmtl_ray.config import ExperimentError, NonFiniteLossError
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.models.representation import representation_module
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.task_pass import Penalty, TaskGradients, TaskPass
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.cut import HeadSide, cut_at, detached, differentiate
from repmtl_ray.saliency import arrange
from repmtl_ray.tasks import Task


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
            "<task>/train_loss" (L_t before the step, over the global batch, if it has labels),
            "rep_mtl/tsr" and "rep_mtl/csa" (weighted), "gradient_norm" (the update's, for a policy
            that makes it itself); equal on every worker.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite; names task, policy and step.
                Parameters and optimiser state are unchanged.
        """
        with cut_at(representation_module(self.model, self.representation)) as cut:
            predictions = self._predictions(batch, global_step)
        sums, counts = self._loss_sums(predictions, batch)
        plain_losses, losses, present = self._global_losses(sums, counts)
        heads = [list(self.model.heads[task.name].parameters()) for task in self.tasks]
        penalized = self.regularizer.lambda_tsr > 0 or self.regularizer.lambda_csa > 0
        shared = [
            parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad
        ]
        side = differentiate(
            losses,
            cut.leaf,
            shared=shared,
            may_be_after=self.representation != "encoder",
            heads=heads,
            create_graph=penalized,
        )
        penalty: Penalty | None = None
        terms: dict[str, Tensor] = {}
        if penalized:
            penalty, terms = self._penalty(side.saliency, batch, cut.leaf, side.after, heads)
        loss_values = self._checked_losses(plain_losses, side, penalty, terms, global_step)
        task_pass = TaskPass(
            tasks=tuple(task.name for task in self.tasks),
            plain_losses=plain_losses,
            losses=torch.stack([loss.detach() for loss in losses]),
            log_losses=self.log_losses,
            present=present,
            representation=cut.leaf.detach(),
            saliency=[part.detach() for part in side.saliency],
            head_gradients=[detached(parts) for parts in side.head_gradients],
            head_parameters=heads,
            shared_before=side.before,
            shared_after=side.after,
            shared_after_gradients=[detached(parts) for parts in side.after_gradients],
            encoder_backward=cut.backward_to(side.before),
            sub_batch_gradients=lambda num_parts: self._part_gradients(
                num_parts, predictions, batch, cut.leaf, side.after, global_step
            ),
            penalty=penalty,
            workers=self.workers,
        )
        self.policy.backward(task_pass)
        gradient_norm = self._update(task_pass, global_step)
        if self.policy.needs_losses_after_step:
            self._second_look(batch, global_step)
        train_losses = {
            f"{task.name}/train_loss": value
            for task, value, is_present in zip(
                self.tasks, loss_values, present.tolist(), strict=True
            )
            if is_present
        }
        penalties = {f"rep_mtl/{name}": term.item() for name, term in terms.items()}
        return {**train_losses, **penalties, "gradient_norm": gradient_norm}

    def _predictions(self, batch: Batch, global_step: int) -> list[Tensor]:
        """By task; dropout draws depend on (seed, step, worker) alone."""
        torch.manual_seed(
            zlib.crc32(f"step {self.seed} {global_step} {self.workers.rank}".encode())
        )
        height, width = batch.images.shape[-2:]
        device, low_precision = batch.images.device, self.precision == "bfloat16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision):
            representation = self.model.encoder(batch.images)
            return [
                self.model.predict(
                    task.name, _rows(representation, batch.rows[task.name]), (height, width)
                )
                for task in self.tasks
            ]

    def _loss_sums(
        self, predictions: Sequence[Tensor], batch: Batch, *, part: int = 0, num_parts: int = 1
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Own loss sums and valid counts by task, of the rows whose number in the global batch is
        `part` modulo `num_parts`."""
        sums, counts = [], []
        for task, prediction in zip(self.tasks, predictions, strict=True):
            first = self.workers.rank * prediction.shape[0]
            own = slice((part - first) % num_parts, None, num_parts)
            total, count = task.loss_sum(prediction[own], batch.targets[task.name][own])
            sums.append(total)
            counts.append(count)
        return sums, counts

    def _part_gradients(
        self,
        num_parts: int,
        predictions: Sequence[Tensor],
        batch: Batch,
        leaf: Tensor,
        after: Sequence[Parameter],
        global_step: int,
    ) -> list[TaskGradients]:
        """As `TaskPass.sub_batch_gradients`; a part with a loss that cannot be trained on is an error as
        the whole batch is."""
        most = max(prediction.shape[0] for prediction in predictions) * self.workers.size
        if most < num_parts:
            raise ExperimentError(
                f"batch_size is {most}, but policy {self.policy_name!r} compares {num_parts} "
                f"parts of a batch; take at least {num_parts}."
            )
        parts = []
        for part in range(num_parts):
            sums, counts = self._loss_sums(predictions, batch, part=part, num_parts=num_parts)
            plain_losses, losses, _ = self._global_losses(sums, counts)
            self._check_losses(plain_losses.tolist(), global_step)
            rows = [
                torch.autograd.grad(loss, [leaf, *after], retain_graph=True, allow_unused=True)
                for loss in losses
            ]
            parts.append(
                TaskGradients(
                    saliency=[torch.zeros_like(leaf) if row[0] is None else row[0] for row in rows],
                    shared_after=[row[1:] for row in rows],
                )
            )
        return parts

    def _global_losses(
        self, sums: Sequence[Tensor], counts: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Plain losses [T] (detached), the scalars that are trained on, and which tasks have labels
        [T]."""
        totals = torch.stack([count.detach().double() for count in counts])
        self.workers.total_([totals])
        present = totals > 0
        plain, trained = [], []
        for own_sum, count, has_labels in zip(sums, totals, present.tolist(), strict=True):
            loss = self.workers.total(own_sum) / count.clamp(min=1).to(own_sum.dtype)
            if not has_labels:
                loss = loss + 1.0  # an absent task: plain loss 1, log loss 0, gradients zero
            plain.append(loss)
            trained.append(loss.log() if self.log_losses else loss)
        return torch.stack([loss.detach() for loss in plain]), trained, present

    def _checked_losses(
        self,
        plain_losses: Tensor,
        side: HeadSide,
        penalty: Penalty | None,
        terms: Mapping[str, Tensor],
        global_step: int,
    ) -> list[float]:
        """The plain losses as numbers, once they and all gradients down to the cut are known to be
        finite on every worker.

        Gradients are checked here, before the policy sees them, so that its state stays as it was.
        The losses have to reach the host in any case: the checks travel with them, in one transfer.
        Gradients of the encoder do not exist yet; `_update` checks them by their norm.
        """
        groups = [
            [saliency, *after, *head]
            for saliency, after, head in zip(
                side.saliency, side.after_gradients, side.head_gradients, strict=True
            )
        ]
        if penalty is not None:
            by_head = [gradient for head in penalty.heads for gradient in head]
            groups.append([penalty.representation, *penalty.shared_after, *by_head])
            groups[-1] += [term.reshape(1) for term in terms.values()]
        largest = [_largest(group).to(plain_losses.device, torch.float64) for group in groups]
        failures = (~torch.stack(largest).isfinite()).double()
        self.workers.total_([failures])
        num_tasks = len(self.tasks)
        numbers = torch.cat([plain_losses.double(), failures]).tolist()
        self._check_losses(numbers[:num_tasks], global_step)
        names = [f"task {task.name!r}" for task in self.tasks] + ["Rep-MTL's penalty"]
        for name, num_failed in zip(names, numbers[num_tasks:], strict=False):
            if num_failed:
                raise NonFiniteLossError(
                    f"{name}: the gradient is not finite at step {global_step + 1} with policy "
                    f"{self.policy_name!r}; no parameter was changed. Lower the learning rate, or look at this loss, its "
                    "labels and its predictions."
                )
        return numbers[:num_tasks]

    def _check_losses(self, values: Sequence[float], global_step: int) -> None:
        for task, value in zip(self.tasks, values, strict=True):
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
            torch.stack(list(terms.values())).sum(),
            [leaf, *after, *flat_heads],
            allow_unused=True,
            retain_graph=self.policy.needs_sub_batches,
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

    def _update(self, task_pass: TaskPass, global_step: int) -> float:
        """Clips, checks and applies what the policy left in `.grad`; returns its norm before."""
        parameters = [
            parameter for parameter in self.model.parameters() if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        # A finite norm says that every gradient is finite, and its square too (Adam's moments).
        # It has to reach the host in any case, and is the same on every worker.
        gradient_norm = float(norm)
        if not math.isfinite(gradient_norm):
            message = self._non_finite_update(parameters, task_pass, global_step)
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLossError(message)
        if self.max_gradient_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_gradient_norm, norm)
        if self.policy.makes_update:
            _descend(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()  # without gradients it changes nothing, but schedulers count it
        self.optimizer.zero_grad(set_to_none=True)
        return gradient_norm

    def _non_finite_update(
        self, parameters: Sequence[Parameter], task_pass: TaskPass, global_step: int
    ) -> str:
        """What is wrong with gradients whose norm is not finite; costs a backward a task."""
        place = f"at step {global_step + 1} with policy {self.policy_name!r}"
        end = "no parameter was changed. Lower the learning rate, or look at these losses."
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        largest = float(_largest(gradients))
        finite = task_pass.jacobian().isfinite().all(dim=1).tolist()
        penalty = task_pass.global_penalty_gradient()
        culprits = [
            f"task {task.name!r}" for task, fine in zip(self.tasks, finite, strict=True) if not fine
        ]
        if penalty is not None and not math.isfinite(float(_largest(penalty))):
            culprits.append("Rep-MTL's penalty")
        if math.isfinite(largest):
            tasks = ", ".join(repr(task.name) for task in self.tasks)
            return (
                f"tasks {tasks}: the norm of the gradient overflows {place}, though every entry is "
                f"finite (the largest is {largest:.3g}); {end}"
            )
        if culprits:
            return f"{', '.join(culprits)}: the encoder's gradient is not finite {place}; {end}"
        tasks = ", ".join(repr(task.name) for task in self.tasks)
        return (
            f"tasks {tasks}: each gradient is finite, but their combination is not {place}; {end}"
        )

    @torch.no_grad()
    def _second_look(self, batch: Batch, global_step: int) -> None:
        with frozen_statistics(self.model):
            sums, counts = self._loss_sums(self._predictions(batch, global_step), batch)
        totals = torch.stack(
            [*(own.double() for own in sums), *(count.double() for count in counts)]
        )
        self.workers.total_([totals])
        loss_sums, label_counts = totals.chunk(2)
        losses = torch.where(label_counts > 0, loss_sums / label_counts.clamp(min=1), 1.0)
        for task, value in zip(self.tasks, losses.tolist(), strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"task {task.name!r}: loss is {value} after the update of step {global_step + 1} with policy "
                    f"{self.policy_name!r}. Lower the learning rate."
                )
        self.policy.after_optimizer_step(losses.to(sums[0].dtype))


@torch.no_grad()
def _descend(optimizer: torch.optim.Optimizer) -> None:
    """Subtracts the learning rate times what stands in `.grad`; weight decay as AdamW has it."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.mul_(1 - rate * group["weight_decay"]).add_(parameter.grad, alpha=-rate)


def _largest(tensors: Iterable[Tensor | None]) -> Tensor:
    """The largest absolute entry; NaN if any entry is."""
    return nn.utils.get_total_norm([t for t in tensors if t is not None and t.numel()], math.inf)


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
