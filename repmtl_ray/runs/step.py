"""One optimisation step: forward, task gradients at the representation, penalty, policy, optimiser.

Owns the way of one batch from images to changed parameters. The graph is split at the
representation: heads and losses are differentiated once per task (twice where the penalty needs
it), the encoder once for all tasks together, or once per task for policies that combine parameter
gradients. No Ray: `Workers` is all it knows of other processes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from repmtl_ray.collectives import Workers
from repmtl_ray.conversion import NonFiniteGradientError
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import frozen_statistics
from repmtl_ray.models.compute import autocast_to
from repmtl_ray.models.representation import representation_module
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.task_pass import Penalty, TaskPass
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.finite_checks import (
    BatchLosses,
    HostValues,
    check_losses_after_step,
    check_losses_and_gradients,
    check_norm,
)
from repmtl_ray.runs.graph_split import (
    GraphSplit,
    TaskDerivatives,
    detached,
    differentiate_saliency,
    differentiate_tasks,
    split_graph_at,
)
from repmtl_ray.runs.looks import look, losses_at, sub_batch_gradients
from repmtl_ray.runs.loss_scale import LossScale
from repmtl_ray.runs.parameters import apply_update
from repmtl_ray.runs.penalty import Control, diagnosed, differentiate_penalty
from repmtl_ray.saliency import align_task_rows, channels_first
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
        max_gradient_norm: longer gradients are scaled down to it; None does not clip.
        precision, seed: as in `Experiment`.
        workers: whose rows together are the global batch.
        diagnostics, direction: as in `RegularizerConfig`.
        loss_scale: of a run in float16; None otherwise.
        holdout: `global_step` of `step` -> own part of a batch of the holdout split, if needed.
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
    diagnostics: bool = False
    direction: Literal["penalty", "random", "flipped", "divergence"] = "penalty"
    loss_scale: LossScale | None = None
    holdout: Callable[[int], Batch] | None = None

    def step(self, batch: Batch, *, global_step: int) -> dict[str, float]:
        """Trains on one global batch, of which `batch` is this worker's part.

        Args:
            batch: on the model's device.
            global_step: number of steps before this one; dropout's and random policies' draws
                depend on it.

        Returns:
            "<task>/train_loss" (L_t before the step, over the global batch, if it has labels),
            "rep_mtl/tsr" and "rep_mtl/csa" (weighted), "gradient_norm" (the update's, for a policy
            that makes it itself), with penalties or `diagnostics` "rep_mtl/<quantity>" of
            `diagnose`; equal on every worker.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite; names task, policy and step.
                Parameters and optimiser state are unchanged.
        """
        if self.loss_scale is None:
            return self._updates(batch, global_step)
        return self.loss_scale.attempt(
            partial(self._updates, batch, global_step), self.policy, self.optimizer
        )

    def _updates(self, batch: Batch, global_step: int) -> dict[str, float]:
        metrics = self._update_once(batch, global_step)
        while self.policy.wants_another_update:
            self._update_once(batch, global_step)
        return metrics

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def _update_once(self, batch: Batch, global_step: int) -> dict[str, float]:
        """One pass and one optimiser step; metrics as `step`."""
        where = self.where(global_step)
        # The encoder's graph ends and the heads' graph begins at the split. Each loss is
        # differentiated through its head alone; the encoder waits for the policy's decision.
        penalized = self.regularizer.lambda_tsr > 0 or self.regularizer.lambda_csa > 0
        # The penalty, and what some policies do with heads, are functions of these derivatives.
        split, predictions, losses, derivatives = self.differentiated(
            batch, global_step, create_graph=penalized or self.policy.needs_head_derivatives
        )
        penalty: Penalty | None = None
        penalty_terms: dict[str, Tensor] = {}
        if penalized:
            penalty, penalty_terms = differentiate_penalty(
                self.regularizer,
                self._saliency(batch, derivatives),
                split.leaf,
                downstream=derivatives.downstream_parameters,
                heads=self.head_parameters,
                keep_graph=self.policy.needs_sub_batches or self.policy.needs_head_derivatives,
                control=self._control(batch, global_step),
                scale=self._scale,
            )
        diagnostics: dict[str, Tensor] = {}
        if penalized or self.diagnostics:
            diagnostics = diagnosed(
                self._saliency(batch, derivatives),
                derivatives.saliency,
                penalty,
                tasks=self.task_names,
                workers=self.workers,
            )
        # Every worker raises here, or none: the policy and the optimiser have seen nothing yet.
        values = self.checked(losses, derivatives, penalty, where, penalty_terms, diagnostics)
        task_pass = self.task_pass(
            batch, global_step, predictions, values, split, derivatives, penalty
        )
        self.policy.backward(task_pass)
        gradient_norm = self._update(task_pass, where)
        if self.policy.needs_losses_after_step:
            self._show_losses_after_step(batch, global_step)
        metrics = {
            f"{task}/train_loss": loss
            for task, loss, is_present in zip(
                self.task_names, values.plain.tolist(), values.present.tolist(), strict=True
            )
            if is_present
        }
        return {**metrics, **values.reported, "gradient_norm": gradient_norm}

    def checked(
        self,
        losses: BatchLosses,
        derivatives: TaskDerivatives,
        penalty: Penalty | None,
        where: str,
        penalty_terms: Mapping[str, Tensor],
        diagnostics: Mapping[str, Tensor],
    ) -> HostValues:
        """What the host is to know of a pass, as `check_losses_and_gradients`."""
        return check_losses_and_gradients(
            self.task_names,
            losses,
            derivatives,
            penalty,
            penalty_terms=penalty_terms,
            diagnostics=diagnostics,
            workers=self.workers,
            log_losses=self.log_losses,
            where=where,
        )

    def where(self, global_step: int) -> str:
        """Step and policy, for messages."""
        return f"at step {global_step + 1} with policy {self.policy_name!r}"

    def differentiated(
        self,
        batch: Batch,
        global_step: int,
        *,
        part: tuple[int, int] = (0, 1),
        create_graph: bool = False,
    ) -> tuple[GraphSplit, list[Tensor], BatchLosses, TaskDerivatives]:
        """One forward pass and every task's derivative downstream of the split."""
        with split_graph_at(representation_module(self.model, self.representation)) as split:
            predictions = self._predictions(batch, global_step)
        losses = self.losses(predictions, batch, sub_batch=part[0], num_sub_batches=part[1])
        derivatives = differentiate_tasks(
            losses.trained,
            split.leaf,
            shared=[p for p in self.model.encoder.parameters() if p.requires_grad],
            may_be_downstream=self.representation != "encoder",
            heads=self.head_parameters,
            create_graph=create_graph,
            scale=self._scale,
        )
        return split, predictions, losses, derivatives

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def head_parameters(self) -> list[list[Parameter]]:
        return [list(self.model.heads[task.name].parameters()) for task in self.tasks]

    def _predictions(self, batch: Batch, global_step: int) -> list[Tensor]:
        """By task; dropout's draws depend on (seed, step, worker) alone."""
        torch.manual_seed(
            zlib.crc32(f"step {self.seed} {global_step} {self.workers.rank}".encode())
        )
        with autocast_to(self.precision, batch.device):
            predictions = self.model(batch.inputs, batch.rows)
        return [predictions[task.name] for task in self.tasks]

    def losses(
        self,
        predictions: Sequence[Tensor],
        batch: Batch,
        *,
        sub_batch: int = 0,
        num_sub_batches: int = 1,
    ) -> BatchLosses:
        """The losses of a sub-batch: the rows whose number in the global batch is `sub_batch`
        modulo `num_sub_batches`."""
        sums, counts = self._own_loss_sums(predictions, batch, sub_batch, num_sub_batches)
        totals = torch.stack([count.detach().double() for count in counts])
        self.workers.total_([totals])
        present = totals > 0
        plain, trained = [], []
        # A count is a sum of weights where labels weigh differently, and may be below 1.
        counted = torch.where(present, totals, 1.0)
        for own_sum, count, is_absent in zip(sums, counted, ~present, strict=True):
            # `total` is differentiable: this worker's part of the gradient follows from its own
            # rows, and the parts of all workers add up to the gradient of the global mean.
            loss = self.workers.total(own_sum) / count.to(own_sum.dtype)
            # An absent task: plain loss 1, log loss 0, gradients zero. The host is not asked which.
            loss = loss + is_absent.to(loss.dtype)
            plain.append(loss)
            trained.append(loss.log() if self.log_losses else loss)
        return BatchLosses(
            plain=torch.stack([loss.detach() for loss in plain]),
            trained=trained,
            present=present,
        )

    def _own_loss_sums(
        self, predictions: Sequence[Tensor], batch: Batch, sub_batch: int, num_sub_batches: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """By task, the sum of the loss over this worker's valid labels, and their number."""
        sums, counts = [], []
        for task, prediction in zip(self.tasks, predictions, strict=True):
            first_row = self.workers.rank * prediction.shape[0]  # in the global batch
            rows = slice((sub_batch - first_row) % num_sub_batches, None, num_sub_batches)
            loss_sum, count = task.loss_sum(prediction[rows], batch.targets[task.name][rows])
            sums.append(loss_sum)
            counts.append(count)
        return sums, counts

    def _saliency(self, batch: Batch, derivatives: TaskDerivatives) -> Tensor:
        """[tasks, batch, channels, *positions], with sample b of every task in row b."""
        aligned = align_task_rows(
            derivatives.saliency, [batch.rows[task.name] for task in self.tasks]
        )
        return channels_first(aligned, self.model.channel_axis)

    def _control(self, batch: Batch, global_step: int) -> Control | None:
        """Of a study; None for the penalty's own gradient."""
        if self.direction == "penalty":
            return None
        return Control(
            direction=self.direction,
            draw_seed=zlib.crc32(f"direction {self.seed} {global_step}".encode()),
            rows=[batch.rows[task.name] for task in self.tasks],
            workers=self.workers,
        )

    def task_pass(
        self,
        batch: Batch,
        global_step: int,
        predictions: Sequence[Tensor],
        values: HostValues,
        split: GraphSplit,
        derivatives: TaskDerivatives,
        penalty: Penalty | None,
    ) -> TaskPass:
        """What the policy sees: values without a graph, and the ways to ask for more."""
        heads = self.head_parameters
        return TaskPass(
            tasks=self.task_names,
            plain_losses=values.plain,
            losses=values.trained,
            log_losses=self.log_losses,
            present=values.present,
            representation=split.leaf.detach(),
            saliency=[saliency.detach() for saliency in derivatives.saliency],
            head_gradients=[detached(of_task) for of_task in derivatives.head_gradients],
            head_parameters=heads,
            upstream_parameters=derivatives.upstream_parameters,
            downstream_parameters=derivatives.downstream_parameters,
            downstream_gradients=[
                detached(of_task) for of_task in derivatives.downstream_gradients
            ],
            encoder_backward=split.backward_to(
                derivatives.upstream_parameters, self.model.encoder, scale=self._scale
            ),
            sub_batch_gradients=partial(
                sub_batch_gradients,
                *(self, batch, global_step, derivatives, split.leaf, predictions),
                scale=self._scale,
            ),
            head_derivatives=lambda task, direction: differentiate_saliency(
                derivatives.saliency[task], direction, heads[task], scale=self._scale
            ),
            look=partial(look, self, batch, global_step, derivatives),
            losses_at=partial(losses_at, self, batch, global_step, derivatives),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            penalty=penalty,
            workers=self.workers,
        )

    def _update(self, task_pass: TaskPass, where: str) -> float:
        """Checks, clips and applies what the policy left in `.grad`.

        Returns:
            The norm before clipping, the same on every worker.
        """
        parameters = [
            parameter for parameter in self.model.parameters() if parameter.grad is not None
        ]
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        norm = nn.utils.get_total_norm(gradients)
        gradient_norm = float(norm)
        try:
            check_norm(gradient_norm, gradients, task_pass, where=where)
        except NonFiniteGradientError:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        if self.max_gradient_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_gradient_norm, norm)
        if self.policy.makes_update:
            apply_update(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.step()  # without gradients it changes nothing, but schedulers count it
        self.optimizer.zero_grad(set_to_none=True)
        return gradient_norm

    @torch.no_grad()
    def _show_losses_after_step(self, batch: Batch, global_step: int) -> None:
        """Gives the policy the plain losses of the same batch with the new parameters.

        Raises:
            NonFiniteLossError: a loss that is not finite; the policy does not see it.
        """
        # A second forward pass over one batch must not count twice in the running statistics.
        with frozen_statistics(self.model):
            losses = self.plain_losses(batch, global_step).cpu()
        check_losses_after_step(self.task_names, losses, where=self.where(global_step))
        self.policy.after_optimizer_step(losses)

    def plain_losses(self, batch: Batch, global_step: int) -> Tensor:
        """[T], replicated, by one forward pass without a graph; an absent task's is 1."""
        predictions = self._predictions(batch, global_step)
        sums, counts = self._own_loss_sums(predictions, batch, 0, 1)
        totals = torch.stack(
            [*(own.double() for own in sums), *(count.double() for count in counts)]
        )
        self.workers.total_([totals])
        loss_sums, label_counts = totals.chunk(2)
        counted = torch.where(label_counts > 0, label_counts, 1.0)
        losses = torch.where(label_counts > 0, loss_sums / counted, 1.0)
        return losses.to(sums[0].dtype)
