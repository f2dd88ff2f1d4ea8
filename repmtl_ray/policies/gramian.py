"""Policies that see task gradients through their inner products alone.

Owns the way from a pass to the Gramian of the present tasks' gradients, from weights to finished
gradients, the fall-back when a solver fails, and what may be varied in every such method:
normalised gradients, clipping, the heads' weights, the steps between two solutions, the momentum of
weights. Owns no method.
"""

from __future__ import annotations

import logging
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import (
    Decay,
    HeadWeights,
    NonNegative,
    Normalization,
    PositiveInt,
    ScaleOfWeights,
)
from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import refuse_loss_with_logs, require_finite_gradients
from repmtl_ray.policies.gradient_lists import blocks_of, filled, stacked
from repmtl_ray.policies.state import read_state, write_state
from repmtl_ray.policies.task_pass import TaskPass

logger = logging.getLogger(__name__)
_COLUMNS_AT_ONCE = 1 << 22
_COLUMNS_OF_A_BLOCK_AT_ONCE = 1 << 18
"""Fewer, where memory is what counts; with another number a sum is rounded otherwise."""


def products_of(left: Tensor, right: Tensor, num_columns: int = _COLUMNS_AT_ONCE) -> Tensor:
    """[T, T] inner products of the rows of two [T, P], added up in float64 whatever their dtype.

    Args:
        left, right: gradients.
        num_columns: that are in float64 at once.
    """
    products = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for left_part, right_part in zip(
        left.split(num_columns, dim=1), right.split(num_columns, dim=1), strict=True
    ):
        wide = left_part.double()
        products += wide @ (wide if left is right else right_part.double()).T
    return products


def jacobian_blocks(task_pass: TaskPass, num_blocks: int) -> Iterator[Tensor]:
    """The columns of `TaskPass.jacobian` block by block, [T, size] each, never all at once.

    Every block costs T encoder backwards that end at its parameters.

    Args:
        task_pass: of the step.
        num_blocks: of the upstream parameters; the downstream ones are one more.
    """
    upstream, downstream = task_pass.upstream_parameters, task_pass.downstream_parameters
    num_tasks, saliency = len(task_pass.tasks), task_pass.saliency
    for block in blocks_of(upstream, num_blocks):
        rows = stacked((task_pass.encoder_backward(own, block) for own in saliency), num_tasks)
        task_pass.workers.total_([rows])
        yield rows
        del rows  # before the next one is computed
    if downstream:
        after = task_pass.downstream_gradients
        rows = stacked((filled(of_task, downstream) for of_task in after), num_tasks)
        task_pass.workers.total_([rows])
        yield rows


def gramian_of(gradients: Tensor) -> Tensor:
    """[T, T] inner products of the rows of [T, P], as `products_of`."""
    return products_of(gradients, gradients)


@dataclass(kw_only=True, eq=False)
class GramianPolicy(Policy):
    """The combined gradient is a sum of task gradients, with weights that follow from their Gramian.

    The Gramian is in float64 and of the present tasks only; an absent task has weight 0. Where the
    method's weights do not depend on the common scale of all gradients (`scale_free`), it is
    divided by its trace first, so that no absolute epsilon in a solver matters. If all gradients are
    zero, the weights are zero too, and nothing is learnt.

    Args:
        at_representation: combine the gradients there, at the cost of one encoder backward in all.
        normalize: what each task gradient is divided by before the method sees and combines it:
            nothing, its "l2" norm, its "loss", or their product "loss+".
        combined: "tasks" multiplies what the method combines by the number of present tasks, as the
            codes of FairGrad, CAGrad, PIVRG and others do; "one" leaves it.
        max_norm: of the combined gradient (where gradients are combined), which is shortened to it;
            0 does not.
        head_weights: what a head's own gradient is multiplied by: "one"; "weighted", the weight of
            its task before `max_norm` shortens; "official", what the method's official code does.
        update_weights_every: PSMGD: steps between two solutions. In between the weights stay, and a
            step costs one encoder backward. A task that is met for the first time makes the policy
            solve at once.
        parameter_blocks: of the shared parameters, whose task gradients are computed and compared one
            block after the other. With 1 the gradients of all tasks are in memory at once. With more,
            those of one block are, every block costs a backward pass a task that ends at the block, and
            one pass of the weighted losses follows; the update is the same to rounding.
        momentum_of_weights: CR-MOGM: weights are this share of the last step's plus the rest of
            the method's; 0 is off. A task's first weights are the method's own.

    Source:
        CR-MOGM: Zhou et al., NeurIPS 2022, algorithm 1, with a constant coefficient. PSMGD: Xu et
        al., arXiv:2412.10961, whose code is MGDA with sum_to "tasks" and 8 steps; its smoothing and
        clipping have no effect on the update. Both are arguments and no policies, because they
        change nothing else of the method: tables keep one name per method, and a search space can
        vary them like any number.
    """

    at_representation: bool = False
    normalize: Normalization = "none"
    combined: ScaleOfWeights = "one"
    max_norm: NonNegative = 0.0
    head_weights: HeadWeights = "official"
    update_weights_every: PositiveInt = 1
    parameter_blocks: PositiveInt = 1
    momentum_of_weights: Decay = 0.0

    allows_representation = True
    scale_free: ClassVar[bool] = True
    solver: ClassVar[str] = ""
    """What may fail; such a step takes the weights of `_fall_back` and is counted."""
    weighs_heads: ClassVar[bool] = False
    """Whether the official code multiplies the heads' gradients by the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_representation and self.parameter_blocks > 1:
            raise ValueError(
                f"policy.arguments.parameter_blocks of policy {self.name!r} is {self.parameter_blocks} with gradients "
                "'representation': no parameter's gradients are compared there. Leave it out, or take gradients "
                "'parameters'."
            )
        unknown = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64)
        self.smoothed_weights, self.kept_weights = unknown, unknown.clone()
        self.solver_failures = 0
        self._shortening = 1.0  # of this step, by `max_norm`

    @abstractmethod
    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P] weights.

        Args:
            gramian: [P, P], float64, on the CPU; not zero; of trace 1 if `scale_free`.
            inputs: of the same tasks.
        """

    def check_loss_scale(self, *, log_losses: bool) -> None:
        refuse_loss_with_logs(self.name, "normalize", self.normalize, log_losses=log_losses)

    @final
    def backward(self, task_pass: TaskPass) -> None:
        inputs = self._inputs_of(task_pass)
        if self.at_representation:
            gradients = task_pass.representation_jacobian()
            gramian = gramian_of(gradients)
            task_pass.workers.total_([gramian])
            combined, self.last_head_weights = self._combine_by(gramian, gradients, inputs)
            cotangent = combined.view_as(task_pass.saliency[0])
            task_pass.finish_at_representation(cotangent, self.last_head_weights)
        elif self._keeps_weights(inputs):
            self._backward_with_kept_weights(task_pass, inputs)
        elif self.parameter_blocks > 1:
            self._backward_in_blocks(task_pass, inputs)
        else:
            combined, self.last_head_weights = self._combine(task_pass.jacobian(), inputs)
            task_pass.finish_with_direction(combined, self.last_head_weights)
        self.step += 1

    def _backward_in_blocks(self, task_pass: TaskPass, inputs: StepInputs) -> None:
        num_tasks, device = len(self.tasks), task_pass.saliency[0].device
        gramian = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
        for block in jacobian_blocks(task_pass, self.parameter_blocks):
            gramian += products_of(block, block, _COLUMNS_OF_A_BLOCK_AT_ONCE)
            del block  # before the next one is computed
        weights, self.last_head_weights = self._weights_by(gramian, inputs)
        penalty = task_pass.penalty
        if penalty is None or penalty.share is None:
            task_pass.finish_with_weights(weights, head_weights=self.last_head_weights)
        else:  # a share is of the combined gradient at the parameters
            direction = task_pass.direction(weights)
            task_pass.finish_with_direction(direction, self.last_head_weights)

    def _backward_with_kept_weights(self, task_pass: TaskPass, inputs: StepInputs) -> None:
        self._observe(inputs)
        weights = self._spread(self.kept_weights[inputs.tasks], inputs.tasks, absent=0.0)
        if self.max_norm == 0:
            self._set_weights(weights, norm=0.0)
            self.last_head_weights = self._weights_of_heads(inputs)
            task_pass.finish_with_weights(weights, head_weights=self.last_head_weights)
            return
        direction = task_pass.direction(weights)
        norm = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
        self._set_weights(weights, norm=norm)
        self.last_head_weights = self._weights_of_heads(inputs)
        task_pass.finish_with_direction(direction * self._shortening, self.last_head_weights)

    @final
    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        return self._combine_by(gramian_of(gradients), gradients, inputs)

    def _combine_by(
        self, gramian: Tensor, gradients: Tensor, inputs: StepInputs
    ) -> tuple[Tensor, Tensor]:
        """As `_combine`, by weights that follow from the [T, T] Gramian."""
        weights, head_weights = self._weights_by(gramian, inputs)
        return weights.to(gradients, non_blocking=True) @ gradients, head_weights

    def _weights_by(self, gramian: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """[T] weights of the task gradients, and of the heads' own, from the [T, T] Gramian."""
        gramian, tasks = gramian.cpu(), inputs.tasks
        is_finite = gramian.diagonal().isfinite()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        gramian = gramian[tasks][:, tasks]
        if self._keeps_weights(inputs):
            self._observe(inputs)
            weights = self.kept_weights[tasks]
        else:
            sizes = self._sizes(self.normalize, gramian.diagonal().sqrt(), inputs)
            self._observe(inputs)
            compared = self._compared(gramian / torch.outer(sizes, sizes), inputs)
            trace = compared.trace()
            weights = torch.zeros(len(tasks), dtype=torch.float64)
            if trace > 0:
                solved = self._solved(compared / trace if self.scale_free else compared, inputs)
                weights = self._smoothed(solved, tasks) / sizes
                if self._multiplies:
                    weights = len(tasks) * weights
            if self.update_weights_every > 1:
                self.kept_weights[tasks] = weights
        norm = (weights @ gramian @ weights).clamp(min=0).sqrt()
        self._set_weights(self._spread(weights, tasks, absent=0.0), norm=float(norm))
        assert self.last_weights is not None
        return self.last_weights, self._weights_of_heads(inputs)

    def _keeps_weights(self, inputs: StepInputs) -> bool:
        """Whether this step takes the weights of the last solution; the same on every worker."""
        if self.step % self.update_weights_every == 0:
            return False
        return not bool(self.kept_weights[inputs.tasks].isnan().any())

    def _set_weights(self, weights: Tensor, *, norm: float) -> None:
        """Sets the step's [T] weights, shortened if the combined gradient is longer than
        allowed."""
        self._shortening = self.max_norm / norm if 0 < self.max_norm < norm else 1.0
        self.last_weights = weights * self._shortening

    def _observe(self, inputs: StepInputs) -> None:
        """What a method learns from the losses of every step, also of one that keeps its weights."""

    @property
    def _multiplies(self) -> bool:
        """Whether the weights are still to be multiplied by the number of present tasks."""
        return self.combined == "tasks"

    def _compared(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P, P]: the Gramian of the gradients that the method compares, if it does not compare the
        tasks' own."""
        return gramian

    @final
    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        """[T] weights of the heads' own gradients."""
        assert self.last_weights is not None
        if self.head_weights == "one":
            return torch.ones(len(self.tasks), dtype=torch.float64)
        if self.head_weights == "weighted" or self.weighs_heads:
            return self.last_weights / self._shortening
        return self._official_head_weights(inputs)

    def _official_head_weights(self, inputs: StepInputs) -> Tensor:
        """[T] those of the official code, if it does not take the weights of the tasks."""
        return torch.ones(len(self.tasks), dtype=torch.float64)

    def _fall_back(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P] weights for a step whose solver failed; arguments as for `gramian_weights`."""
        num_present = len(inputs.tasks)
        return torch.full((num_present,), 1 / num_present, dtype=torch.float64)

    def _solved(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        if not self.solver:
            return self.gramian_weights(gramian, inputs)
        reason = "its result is not finite"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # solvers' remarks on speed and accuracy
                weights = self.gramian_weights(gramian, inputs)
            if bool(weights.isfinite().all()):
                return weights
        except _solver_errors() as error:
            reason = f"{type(error).__name__}: {error}"
        self.solver_failures += 1
        if self.solver_failures == 1:
            logger.warning(
                "policy %r: %s failed at step %d (%s); this step falls back as its documentation "
                "says. Further failures are only counted, in the metric solver_failures.",
                self.name,
                self.solver,
                self.step + 1,
                reason,
            )
        return self._fall_back(gramian, inputs)

    def _smoothed(self, weights: Tensor, tasks: Tensor) -> Tensor:
        momentum = self.momentum_of_weights
        if momentum == 0:
            return weights
        last = self.smoothed_weights[tasks]
        smoothed = torch.where(last.isnan(), weights, momentum * last + (1 - momentum) * weights)
        self.smoothed_weights[tasks] = smoothed
        return smoothed

    def metrics(self) -> dict[str, float]:
        failures = {"solver_failures": float(self.solver_failures)} if self.solver else {}
        return super().metrics() | failures

    @property
    def _names(self) -> tuple[str, ...]:
        failures = ("solver_failures",) if self.solver else ()
        momentum = ("smoothed_weights",) if self.momentum_of_weights else ()
        kept = ("kept_weights",) if self.update_weights_every > 1 else ()
        return (*self.state_names, *failures, *momentum, *kept)

    def _state(self) -> dict[str, Any]:
        return read_state(self, self._names)

    def _load_state(self, state: dict[str, Any]) -> None:
        write_state(self, self._names, state, self.name)


def _solver_errors() -> tuple[type[Exception], ...]:
    """What a solver raises when it fails."""
    errors = (ArithmeticError, RuntimeError, TypeError, ValueError)
    if "cvxpy" not in sys.modules:  # few methods need it, and it takes a second to load
        return errors
    from cvxpy.error import SolverError

    return (*errors, SolverError)
