"""PIVRG: performance-informed variance reduction of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import (
    Number,
    NumberPerTask,
    PerTask,
    Positive,
    ScaleOfWeights,
)
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class PIVRG(GramianPolicy):
    """FairGrad's equation with a preference for lagging tasks: G x = (v / x)^(1/2).

    v = P softmax(S / q) over the P present tasks. S_t is how much worse than its single-task model
    task t is, in percent: its mean training loss over the last epoch in which it had labels,
    against `single_task_losses`. q = max((max S - min S) / log(bound), min_temperature), so that no
    v is more than `bound` times another. In the first epoch v is 1: FairGrad's equation with alpha
    2. Needs positive losses, because it takes their ratios. A task with a zero gradient gets weight
    0; a step whose solver fails takes equal weights.

    Args:
        single_task_losses: by task, the mean training loss of the last epoch of a run with policy
            "stl" and the same data, model and epochs ("<task>/train_loss" of its history).
        bound: of the ratio of two preferences.
        min_temperature: of the softmax, in percent.
        combined: "tasks", the combined gradient times P, as in the code; "one" as the equation.

    Source:
        Qin, Wang and Yan, "Revisiting fairness in multitask learning: a performance-driven approach
        for variance reduction", CVPR 2025, and its official code, which also clips the shared
        gradient to norm 1. Bound and smallest temperature: 2 and 10 for NYUv2 and CelebA, 1.8 and
        20 for Cityscapes, 1.8 and 100 for QM9. Deviation: the code takes relative losses of a
        task's metrics, on training or validation data; a policy sees losses, so S is of the
        training loss. Solved by scipy's least_squares at trace 1 and scaled back, exactly. State:
        S, the sums of the present epoch, the count of failures.
    """

    single_task_losses: Annotated[PerTask, NumberPerTask(Number(above=0))] = field()
    bound: Annotated[float, Number(above=1)] = 2.0
    min_temperature: Positive = 10.0
    combined: ScaleOfWeights = "tasks"
    max_norm: Annotated[float, Number(at_least=0)] = 1.0

    name = "PIVRG"
    libraries = ("scipy",)
    solver = "scipy.optimize.least_squares"
    scale_free = False
    needs_positive_losses = True
    state_names = ("excess", "loss_sums", "num_batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.excess = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.loss_sums, self.num_batches = (
            torch.zeros_like(self.excess),
            torch.zeros_like(self.excess),
        )

    @property
    def _multiplies(self) -> bool:
        return False  # its own equation has the factor

    def _observe(self, inputs: StepInputs) -> None:
        self.loss_sums[inputs.tasks] += inputs.losses
        self.num_batches[inputs.tasks] += 1

    def end_epoch(self) -> None:
        alone = torch.tensor(self.single_task_losses, dtype=torch.float64)
        had_labels = self.num_batches > 0
        excess = 100 * (self.loss_sums / self.num_batches / alone - 1)
        self.excess = torch.where(had_labels, excess, self.excess)
        self.loss_sums, self.num_batches = torch.zeros_like(alone), torch.zeros_like(alone)

    def preferences(self, tasks: Tensor) -> Tensor:
        """[P] v of these tasks, which sum to P."""
        excess = self.excess[tasks]
        spread = float(excess.max() - excess.min())
        temperature = max(spread / math.log(self.bound), self.min_temperature)
        return len(tasks) * (excess / temperature).softmax(dim=0)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        import numpy as np
        from scipy.optimize import least_squares

        has_gradient, trace = gramian.diagonal() > 0, gramian.trace()
        matrix = (gramian[has_gradient][:, has_gradient] / trace).numpy()
        preferences = self.preferences(inputs.tasks[has_gradient]).numpy()
        solution = least_squares(
            lambda x: matrix @ x - (preferences / x) ** 0.5,
            np.full(len(matrix), 1 / len(matrix)),
            jac=lambda x: matrix + np.diag(0.5 * preferences**0.5 * x**-1.5),
            bounds=(0, math.inf),
        )
        weights = torch.zeros(len(inputs.tasks), dtype=torch.float64)
        weights[has_gradient] = torch.from_numpy(solution.x)
        times = float(len(inputs.tasks)) if self.combined == "tasks" else 1.0
        # With x at trace 1, the solution at trace t is x t^(-2/3).
        return times * weights * trace ** (-2 / 3)
