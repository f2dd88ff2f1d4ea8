"""Policies that see task gradients through their inner products alone.

Owns the way from a pass to the Gramian of the present tasks' gradients, from weights to finished
gradients, the fall-back when a solver fails, and the momentum of weights. Owns no method.
"""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Decay
from repmtl_ray.policies.base import Policy, StepInputs
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.state import read_state, write_state
from repmtl_ray.policies.task_pass import TaskPass

logger = logging.getLogger(__name__)
_COLUMNS_AT_ONCE = 1 << 22


def products_of(left: Tensor, right: Tensor) -> Tensor:
    """[T, T] inner products of the rows of two [T, P], added up in float64 whatever their dtype."""
    products = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for left_part, right_part in zip(
        left.split(_COLUMNS_AT_ONCE, dim=1), right.split(_COLUMNS_AT_ONCE, dim=1), strict=True
    ):
        wide = left_part.double()
        products += wide @ (wide if left is right else right_part.double()).T
    return products


def gramian_of(gradients: Tensor) -> Tensor:
    """[T, T] inner products of the rows of [T, P], as `products_of`."""
    return products_of(gradients, gradients)


@dataclass(kw_only=True, eq=False)
class GramianPolicy(Policy):
    """The combined gradient is a sum of task gradients, with weights that follow from their Gramian.

    The Gramian is in float64 and of the present tasks only; an absent task has weight 0. Where the
    method's weights do not depend on the common scale of all gradients (`scale_free`), it is
    divided by its trace first, so that no absolute epsilon in a solver matters. If all gradients are
    zero, the weights are zero too, and nothing is learnt. Heads follow their own task's gradient with
    weight 1, as in LibMTL and TorchJD (nash-mtl's code weighs heads too).

    Args:
        at_representation: combine the gradients there, at the cost of one encoder backward in all.
        momentum_of_weights: CR-MOGM: weights are this share of the last step's plus the rest of
            the method's; 0 is off. A task's first weights are the method's own.

    Source:
        CR-MOGM: Zhou et al., NeurIPS 2022, algorithm 1, with a constant coefficient. It is an
        argument and not a policy, because it changes nothing else of the method that it smooths:
        tables keep one name per method, and a search space can vary it like any number.
    """

    at_representation: bool = False
    momentum_of_weights: Decay = 0.0

    allows_representation = True
    scale_free: ClassVar[bool] = True
    solver: ClassVar[str] = ""
    """What may fail; such a step takes the weights of `_fall_back` and is counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.smoothed_weights = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64)
        self.solver_failures = 0

    @abstractmethod
    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P] weights.

        Args:
            gramian: [P, P], float64, on the CPU; not zero; of trace 1 if `scale_free`.
            inputs: of the same tasks.
        """

    @final
    def backward(self, task_pass: TaskPass) -> None:
        inputs = self._inputs_of(task_pass)
        if self.at_representation:
            gradients = task_pass.representation_jacobian()
            gramian = gramian_of(gradients)
            task_pass.workers.total_([gramian])
            combined, self.head_weights = self._combine_by(gramian, gradients, inputs)
            cotangent = combined.view_as(task_pass.saliency[0])
            task_pass.finish_at_representation(cotangent, self.head_weights)
        else:
            combined, self.head_weights = self._combine(task_pass.jacobian(), inputs)
            task_pass.finish_with_direction(combined, self.head_weights)
        self.step += 1

    @final
    def _combine(self, gradients: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        return self._combine_by(gramian_of(gradients), gradients, inputs)

    def _combine_by(
        self, gramian: Tensor, gradients: Tensor, inputs: StepInputs
    ) -> tuple[Tensor, Tensor]:
        """As `_combine`, by weights that follow from the [T, T] Gramian."""
        gramian, tasks = gramian.cpu(), inputs.tasks
        is_finite = gramian.diagonal().isfinite()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        gramian = self._compared(gramian[tasks][:, tasks], inputs)
        self.last_weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        trace = gramian.trace()
        if trace > 0:
            weights = self._solved(gramian / trace if self.scale_free else gramian, inputs)
            self.last_weights[tasks] = self._smoothed(weights, tasks)
        return self.last_weights.to(gradients) @ gradients, self._weights_of_heads(inputs)

    def _compared(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P, P]: the Gramian of the gradients that the method compares, if it does not compare the
        tasks' own."""
        return gramian

    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        """[T] weights of the heads' own gradients."""
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
        return (*self.state_names, *failures, *momentum)

    def _state(self) -> dict[str, Any]:
        return read_state(self, self._names)

    def _load_state(self, state: dict[str, Any]) -> None:
        write_state(self, self._names, state, self.name)


def _solver_errors() -> tuple[type[Exception], ...]:
    """What a solver raises when it fails."""
    from cvxpy.error import SolverError  # here, because cvxpy takes a second to load

    return (ArithmeticError, RuntimeError, TypeError, ValueError, SolverError)
