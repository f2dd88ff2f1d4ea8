"""ConsMTL: consistent multi-task learning, with heads that pull their tasks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, Number, NumberPerTask, PerTask
from repmtl_ray.policies.base import Policy, weight_metrics
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.fairgrad import FairGrad
from repmtl_ray.policies.gradient_lists import filled
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class ConsMTL(Policy):
    """FairGrad for the shared parameters, and heads that also turn their task's gradient at the
    representation towards the combined one.

    Head t follows the gradient of L_t plus that of -lambda_ <d_t, d>: d_t is its task's gradient at
    the representation, d = sum_t x_t d_t, held fixed, with FairGrad's weights x. The second term is
    a second derivative; its norm over a head is at most `clip` times the first one's. A task that is
    absent, or whose gradient is zero, has weight 0.

    Args:
        lambda_: weight of the second term: 50 for Cityscapes and CelebA, 1 for NYUv2, 0.001 for
            QM9.
        clip: by task, its largest share; 0 turns it off.
        max_norm: of the combined shared gradient, times the number of tasks; 0 does not shorten.

    Source:
        Qin, Wang and Yan, "Towards consistent multi-task learning: unlocking the potential of
        task-specific parameters", CVPR 2025, and its official code (FairGrad with alpha 2, times T,
        shortened to 1; clip 0.1, for Cityscapes 0.05 for segmentation and 0 for depth). Deviations:
        d_t is taken at this project's one representation, which every head sees (the code: at each
        head's own last feature, for dense tasks); with log losses all gradients are those of log
        L_t. State: the count of failures. Costs a second backward pass through every head.
    """

    lambda_: NonNegative = 1.0
    clip: Annotated[PerTask, NumberPerTask(Number(at_least=0))] = 0.1
    max_norm: NonNegative = 1.0

    name = "ConsMTL"
    needs_head_derivatives = True
    names_tasks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fairgrad = FairGrad(tasks=self.tasks, seed=self.seed, combined="one", max_norm=0.0)

    def backward(self, task_pass: TaskPass) -> None:
        inputs = self._inputs_of(task_pass)
        jacobian = task_pass.jacobian()
        is_finite = jacobian.isfinite().all(dim=1).cpu()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        direction, _ = self._fairgrad._combine(jacobian, inputs)
        self.last_weights = self._fairgrad.last_weights
        assert self.last_weights is not None
        direction = direction * len(inputs.tasks)
        norm = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
        if 0 < self.max_norm < norm:
            direction = direction * (self.max_norm / norm)
        self.last_head_weights = torch.ones(len(self.tasks), dtype=torch.float64)
        added = self._pull(task_pass, self.last_weights)
        task_pass.finish_with_direction(direction, self.last_head_weights, added_to_heads=added)
        self.step += 1

    def _pull(self, task_pass: TaskPass, weights: Tensor) -> list[Tensor]:
        """By head parameter, the clipped gradient of -lambda_ <d_t, d>, totalled over workers."""
        pairs = zip(weights.tolist(), task_pass.saliency, strict=True)
        combined = sum(
            (weight * saliency for weight, saliency in pairs),
            torch.zeros_like(task_pass.representation),
        )
        pulls = [
            filled(task_pass.head_derivatives(task, -self.lambda_ * combined), parameters)
            for task, parameters in enumerate(task_pass.head_parameters)
        ]
        pulls = [[gradient.clone() for gradient in head] for head in pulls]
        task_pass.workers.total_(gradient for head in pulls for gradient in head)
        clips: Sequence[float] = self.clip  # type: ignore[assignment] # a tuple once accepted
        for head, main, clip in zip(pulls, task_pass.global_head_gradients(), clips, strict=True):
            longest, length = clip * _norm(main), _norm(head)
            if length > longest:
                for gradient in head:
                    gradient.mul_(longest / length)
        return [gradient for head in pulls for gradient in head]

    def metrics(self) -> dict[str, float]:
        failures = {"solver_failures": float(self._fairgrad.solver_failures)}
        return weight_metrics(self.tasks, self.last_weights) | failures

    @property
    def solver_failures(self) -> int:
        """Steps whose least squares failed; a checkpoint holds it."""
        return self._fairgrad.solver_failures

    @solver_failures.setter
    def solver_failures(self, value: int) -> None:
        self._fairgrad.solver_failures = value

    state_names = ("solver_failures",)


def _norm(gradients: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients]))
