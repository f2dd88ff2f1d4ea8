"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Positive, PositiveInt, ScaleOfWeights
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.checks import SMALLEST_LOSS
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class MGDA(GramianPolicy):
    """The point of smallest norm among all convex combinations of task gradients.

    A zero gradient, or opposed ones, make the shared update zero: there is no common descent.
    Parallel gradients give the shortest.

    Args:
        normalization: what each gradient is divided by while weights are sought: nothing, its "l2"
            norm, its "loss", or their product "loss+". The weights then apply to the gradients
            themselves.
        sum_to: "one", as in the paper, or "tasks": T times that, as nash-mtl has it.
        epsilon: Frank-Wolfe stops at a step below it.
        max_iters: of Frank-Wolfe.

    Source:
        Désidéri 2012; Sener and Koltun, NeurIPS 2018, algorithm 2, normalisations from its code; at
        the representation it is their MGDA-UB. State: none.
    """

    normalization: Literal["none", "l2", "loss", "loss+"] = "none"
    sum_to: ScaleOfWeights = "one"
    epsilon: Positive = 1e-3
    max_iters: PositiveInt = 100

    name = "MGDA"

    def check_loss_scale(self, *, log_losses: bool) -> None:
        if log_losses and self.normalization in ("loss", "loss+"):
            raise ValueError(
                f"policy.arguments.normalization of policy {self.name!r} is "
                f"{self.normalization!r} with log_losses on: the gradient of log L is that of L "
                "divided by L already; take 'none' or 'l2', or turn log_losses off."
            )

    def _compared(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        size = torch.ones(len(gramian), dtype=torch.float64)
        if self.normalization in ("l2", "loss+"):
            norms = gramian.diagonal().sqrt()
            size = torch.where(norms > 0, norms, 1.0)
        if self.normalization in ("loss", "loss+"):
            size = size * inputs.losses.clamp(min=SMALLEST_LOSS)
        return gramian / torch.outer(size, size)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import MGDAWeighting

        total = 1.0 if self.sum_to == "one" else float(len(self.tasks))
        return total * MGDAWeighting(self.epsilon, self.max_iters)(gramian)
