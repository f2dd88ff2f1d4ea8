"""IMTL, the hybrid: losses on one scale by IMTL-L, their gradients combined by IMTL-G.

Owns the joining of the two; the formulas are TorchJD's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.memory import demand_names
from repmtl_ray.policies.refusals import positive_losses
from repmtl_ray.policies.task_adam import TaskAdam
from repmtl_ray.policies.task_pass import TaskPass

if TYPE_CHECKING:
    from torchjd import aggregation
else:
    aggregation = LazyModule("torchjd.aggregation")


class IMTL(GramianPolicy):
    """IMTL: the combination with equal projections on the gradients of e^s_t L_t, s learnt.

    Needs positive losses, as IMTL-L. Heads follow e^s_t L_t. An absent task's s does not move; zero,
    dependent and opposed gradients are as for IMTL-G.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        learning_rate: of s, which has an Adam of its own.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, algorithm 1: equation 3 for
        the weights (IMTL-G), equation 8 for s (IMTL-L), which a step learns after it was used.
        LibMTL learns s with the model's optimiser; here it has IMTL-L's rate. State: s, its Adam.
    """

    name = "IMTL"
    needs_positive_losses = True

    def __init__(self, tasks: Sequence[str], *, learning_rate: float, **common: Any) -> None:
        super().__init__(tasks, **common)
        self.scales = TaskAdam(len(tasks), learning_rate=learning_rate)
        self._factors = torch.ones(len(tasks), dtype=torch.float64)  # of the pass's gradients

    def _normalized(self, gramian: Tensor, task_pass: TaskPass) -> Tensor:
        present = task_pass.present.cpu().nonzero().flatten()
        losses = positive_losses(
            self.name, self.tasks, self.step + 1, task_pass.plain_losses, present
        )
        factors = self.scales.values.exp()
        self.scales.step((factors * losses - 1)[present], present)
        self._factors = factors * losses if task_pass.log_losses else factors
        return gramian * torch.outer(self._factors, self._factors)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self._factors[tasks] * aggregation.IMTLGWeighting()(gramian)

    def _head_weights(self, task_pass: TaskPass) -> Tensor:
        return self._factors

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **self.scales.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        demand_names((*self._names, *TaskAdam.names), state, self.name)
        self.scales.load_state({name: state.pop(name) for name in TaskAdam.names}, self.name)
        super()._load_state(state)
