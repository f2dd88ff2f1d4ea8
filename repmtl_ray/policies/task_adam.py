"""Adam on one number per task, as UW, IMTL-L, IMTL, FAMO and GradNorm learn their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.policies.state import require_names


class TaskAdam:
    """torch.optim.Adam on T separate numbers that start at 0; float64, on the CPU.

    They are separate parameters so that a task without a gradient keeps its number, its moments and
    its step count: with one tensor, Adam's momentum would move it.

    Args:
        num_tasks: T.
        learning_rate, weight_decay: Adam's; the decay is added to the gradient.
    """

    state_names: ClassVar[tuple[str, ...]] = ("values", "adam")
    """Of what `state` returns."""

    def __init__(self, num_tasks: int, *, learning_rate: float, weight_decay: float = 0.0) -> None:
        self._numbers = [Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(num_tasks)]
        self._adam = torch.optim.Adam(
            self._numbers, lr=learning_rate, weight_decay=weight_decay, foreach=False
        )

    @property
    def values(self) -> Tensor:
        """[T], a copy."""
        return torch.stack([number.detach() for number in self._numbers])

    def step(self, gradients: Tensor, tasks: Tensor) -> None:
        """One step for some of the tasks.

        Args:
            gradients: [P].
            tasks: [P] indices.
        """
        self._adam.zero_grad(set_to_none=True)
        for task, gradient in zip(tasks.tolist(), gradients, strict=True):
            self._numbers[task].grad = gradient.clone()
        self._adam.step()

    def state(self) -> dict[str, Any]:
        """Copies of the numbers and of Adam's moments."""
        moments = self._adam.state_dict()["state"]
        return {"values": self.values, "adam": _copied(moments)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any], policy: str) -> None:
        """Copies back what `state` returned.

        Raises:
            ValueError: the state has other entries, or numbers of other tasks.
        """
        require_names(self.state_names, state, policy)
        if len(state["values"]) != len(self._numbers):
            raise ValueError(
                f"policy {policy!r}: the checkpoint holds {len(state['values'])} tasks' weights, "
                f"expected {len(self._numbers)}; resume with the tasks that wrote it."
            )
        for number, value in zip(self._numbers, state["values"], strict=True):
            number.copy_(value)
        self._adam.load_state_dict({**self._adam.state_dict(), "state": _copied(state["adam"])})


def _copied(moments: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    return {
        task: {name: value.clone() for name, value in parts.items()}
        for task, parts in moments.items()
    }
