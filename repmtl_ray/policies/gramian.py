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

from repmtl_ray.policies.base import GradientPolicy, TaskPass
from repmtl_ray.policies.memory import read_back, written

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
_COLUMNS_AT_ONCE = 1 << 22


def gramian_of(jacobian: Tensor) -> Tensor:
    """[T, T] inner products of the rows of [T, P], added up in float64 whatever the rows are in."""
    rows = jacobian.shape[0]
    gramian = torch.zeros(rows, rows, dtype=torch.float64, device=jacobian.device)
    for columns in jacobian.split(_COLUMNS_AT_ONCE, dim=1):
        columns = columns.double()
        gramian += columns @ columns.T
    return gramian


def refuse_non_finite(policy: str, tasks: Sequence[str], step: int, finite: Tensor) -> None:
    """Raises if a task's gradient holds inf or nan.

    Args:
        policy, tasks: names, for the message.
        step: from 1.
        finite: [T] bool, on the CPU.

    Raises:
        ValueError: names the policy, the tasks and the step.
    """
    if not bool(finite.all()):
        names = ", ".join(
            repr(task) for task, fine in zip(tasks, finite.tolist(), strict=True) if not fine
        )
        raise ValueError(
            f"policy {policy!r}: the gradient of task {names} is not finite at step {step}; lower "
            "the learning rate, or look at this task's predictions and labels."
        )


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
        weights = self.last_weights.to(jacobian)
        combined = weights @ jacobian
        if at_representation:
            combined = combined.view_as(task_pass.saliency[0])
            task_pass.finish_at_representation(combined, torch.ones_like(weights))
        else:
            task_pass.finish_with_direction(combined, torch.ones_like(weights))
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
        values: dict[str, float] = {}
        if self.last_weights is not None:
            pairs = zip(self.tasks, self.last_weights.tolist(), strict=True)
            values = {f"weight/{task}": weight for task, weight in pairs}
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
