"""Policies that see task gradients through their inner products alone.

Owns the way from a pass to the Gramian of the present tasks' gradients, from weights to finished
gradients, the fall-back when a solver fails, and the momentum of weights. Owns no method.
"""

from __future__ import annotations

import logging
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.base import GradientPolicy, weight_metrics
from repmtl_ray.policies.memory import read_back, written
from repmtl_ray.policies.refusals import refuse_non_finite
from repmtl_ray.policies.task_pass import TaskPass

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
_COLUMNS_AT_ONCE = 1 << 22


def products_of(left: Tensor, right: Tensor) -> Tensor:
    """[T, T] inner products of the rows of two [T, P], added up in float64 whatever they are in."""
    products = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for ours, theirs in zip(
        left.split(_COLUMNS_AT_ONCE, dim=1), right.split(_COLUMNS_AT_ONCE, dim=1), strict=True
    ):
        wide = ours.double()
        products += wide @ (wide if left is right else theirs.double()).T
    return products


def gramian_of(jacobian: Tensor) -> Tensor:
    """[T, T] inner products of the rows of [T, P], as `products_of`."""
    return products_of(jacobian, jacobian)


class GramianPolicy(GradientPolicy):
    """The combined gradient is a sum of task gradients, with weights found from their Gramian.

    The Gramian is in float64 and of the present tasks only; an absent one has weight 0. Where the
    method's weights do not depend on the common scale of all gradients (`scale_free`), it is
    divided by its trace first, so that no absolute epsilon in a solver bites. If all gradients are
    zero, so are the weights, and nothing is learnt. Heads follow their own task's gradient with
    weight 1, as in LibMTL and TorchJD (nash-mtl's code weighs heads too).

    Args:
        tasks, seed, at_representation: as for every gradient policy.
        momentum_of_weights: CR-MOGM: weights are this share of the last step's plus the rest of
            the method's; 0 is off. A task's first weights are the method's own.

    Source:
        CR-MOGM: Zhou et al., NeurIPS 2022, algorithm 1, with a constant coefficient. It is an
        argument, not a policy of its own, because it changes nothing else of the method that it
        smooths: one name a method in tables, and a search space can vary it like any number.
    """

    name: ClassVar[str]
    allows_representation = True
    scale_free: ClassVar[bool] = True
    solver: ClassVar[str] = ""
    """What may fail; such a step takes `_fall_back`'s weights and is counted."""
    remembered: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        at_representation: bool = False,
        momentum_of_weights: float = 0.0,
    ) -> None:
        super().__init__(tasks, seed=seed, at_representation=at_representation)
        self.momentum_of_weights = momentum_of_weights
        self.smoothed_weights = torch.full((len(tasks),), torch.nan, dtype=torch.float64)
        self.solver_failures = 0
        self.last_weights: Tensor | None = None

    @final
    def backward(self, task_pass: TaskPass) -> None:
        at_representation = self.at_representation
        jacobian = (
            task_pass.representation_jacobian() if at_representation else task_pass.jacobian()
        )
        gramian = gramian_of(jacobian)
        if at_representation:
            task_pass.workers.total_([gramian])
        gramian = gramian.cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, gramian.diagonal().isfinite())
        gramian = self._normalized(gramian, task_pass)
        self.last_weights = self._all_weights(gramian, task_pass.present.cpu())
        combined = self.last_weights.to(jacobian) @ jacobian
        heads = self._head_weights(task_pass)
        if at_representation:
            task_pass.finish_at_representation(combined.view_as(task_pass.saliency[0]), heads)
        else:
            task_pass.finish_with_direction(combined, heads)
        self.step += 1

    @abstractmethod
    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        """[P] weights.

        Args:
            gramian: [P, P], float64, on the CPU, of the tasks that are present; not zero; of trace
                1 if `scale_free`.
            tasks: [P], their indices.
        """

    def _normalized(self, gramian: Tensor, task_pass: TaskPass) -> Tensor:
        """[T, T]: the Gramian of the gradients that the method compares, if not the tasks' own."""
        return gramian

    def _solver_errors(self) -> tuple[type[Exception], ...]:
        """What a solver raises when it fails."""
        return (ArithmeticError, RuntimeError, TypeError, ValueError)

    def _fall_back(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        """[P] weights for a step whose solver failed; arguments as for `_weights`."""
        return torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)

    def _all_weights(self, gramian: Tensor, present: Tensor) -> Tensor:
        tasks = present.nonzero().flatten()
        gramian = gramian[tasks][:, tasks]
        weights = torch.zeros(len(present), dtype=torch.float64)
        trace = gramian.trace()
        if trace > 0:
            found = self._found(gramian / trace if self.scale_free else gramian, tasks)
            weights[tasks] = self._smoothed(found, tasks)
        return weights

    def _found(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        if not self.solver:
            return self._weights(gramian, tasks)
        reason = "its result is not finite"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # solvers' remarks on speed and accuracy
                found = self._weights(gramian, tasks)
            if bool(found.isfinite().all()):
                return found
        except self._solver_errors() as error:
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
        return self._fall_back(gramian, tasks)

    def _smoothed(self, found: Tensor, tasks: Tensor) -> Tensor:
        if self.momentum_of_weights == 0:
            return found
        last = self.smoothed_weights[tasks]
        momentum = self.momentum_of_weights
        found = torch.where(last.isnan(), found, momentum * last + (1 - momentum) * found)
        self.smoothed_weights[tasks] = found
        return found

    def metrics(self) -> dict[str, float]:
        values = weight_metrics(self.tasks, self.last_weights)
        if self.solver:
            values["solver_failures"] = float(self.solver_failures)
        return values

    @property
    def _names(self) -> tuple[str, ...]:
        failures = ("solver_failures",) if self.solver else ()
        momentum = ("smoothed_weights",) if self.momentum_of_weights else ()
        return (*self.remembered, *failures, *momentum)

    def _state(self) -> dict[str, Any]:
        return written(self, self._names)

    def _load_state(self, state: dict[str, Any]) -> None:
        read_back(self, self._names, state, self.name)
