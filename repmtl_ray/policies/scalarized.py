"""What loss-weighing policies share: TorchJD's scalarizers behind `LossPolicy`.

Owns what TorchJD leaves to its user: absent tasks, refused losses, and a state that survives a
checkpoint. The formulas are TorchJD's; a policy differentiates them at the detached losses. All of
it happens in float64 on the CPU: T numbers a step, equal on every worker. Owns no method.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.base import LossPolicy
from repmtl_ray.policies.memory import read_back, written
from repmtl_ray.policies.refusals import SMALLEST_LOSS, refuse_losses

if TYPE_CHECKING:
    from torchjd.scalarization import Scalarizer

CPU = torch.device("cpu")


class ScalarizedLosses(LossPolicy):
    """Weights are the derivatives of a scalarizer at the losses of the tasks that are present.

    A positive loss below `SMALLEST_LOSS`, or zero, counts as `SMALLEST_LOSS`. An absent task gets
    weight 0.
    """

    name: ClassVar[str]
    remembered: ClassVar[tuple[str, ...]] = ()

    @final
    def weights(self, losses: Tensor, present: Tensor) -> Tensor:
        tasks = present.cpu().nonzero().flatten()
        values = losses.detach().to("cpu", torch.float64)
        self._check(values, tasks)
        if self.needs_positive_losses:
            values = values.clamp(min=SMALLEST_LOSS)
        weights = torch.zeros_like(values)
        if len(tasks):
            weights[tasks] = self._weights(values[tasks], tasks)
        return weights.to(losses.device)

    @abstractmethod
    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        """[P] weights.

        Args:
            losses: [P], float64, on the CPU, of the tasks that are present.
            tasks: [P], their indices.
        """

    def _check(self, losses: Tensor, tasks: Tensor) -> None:
        positive = self.needs_positive_losses
        refuse_losses(self.name, self.tasks, self.step + 1, losses, tasks, positive=positive)

    def _state(self) -> dict[str, Any]:
        return written(self, self.remembered)

    def _load_state(self, state: dict[str, Any]) -> None:
        read_back(self, self.remembered, state, self.name)


def gradient_of(scalarizer: Scalarizer, losses: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The scalarizer's derivatives by the losses and by `others`."""
    with torch.enable_grad():
        losses = losses.detach().requires_grad_()
        return torch.autograd.grad(scalarizer(losses), (losses, *others))
