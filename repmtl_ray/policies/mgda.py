"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Normalization, Positive, PositiveInt, ScaleOfWeights
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.checks import refuse_loss_with_logs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class MGDA(GramianPolicy):
    """The point of smallest norm among all convex combinations of task gradients.

    A zero gradient, or opposed ones, make the shared update zero: there is no common descent.
    Parallel gradients give the shortest.

    Args:
        normalization: what each gradient is divided by while weights are sought: nothing, its "l2"
            norm, its "loss", or their product "loss+". The weights then apply to the gradients
            themselves, unlike with `normalize`.
        sum_to: "one", as in the paper, or "tasks": T times that, as nash-mtl has it.
        epsilon: Frank-Wolfe stops at a step below it.
        max_iters: of Frank-Wolfe.

    Source:
        Désidéri 2012; Sener and Koltun, NeurIPS 2018, algorithm 2, normalisations from its code; at
        the representation it is their MGDA-UB. Heads train on the weighted losses, as in the
        official code (isl-org) and in nash-mtl; in LibMTL with weight 1. State: none.
    """

    normalization: Normalization = "none"
    sum_to: ScaleOfWeights = "one"
    epsilon: Positive = 1e-3
    max_iters: PositiveInt = 100

    name = "MGDA"

    weighs_heads = True

    def check_loss_scale(self, *, log_losses: bool) -> None:
        super().check_loss_scale(log_losses=log_losses)
        refuse_loss_with_logs(self.name, "normalization", self.normalization, log_losses=log_losses)

    def _compared(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        sizes = self._sizes(self.normalization, gramian.diagonal().sqrt(), inputs)
        return gramian / torch.outer(sizes, sizes)

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import MGDAWeighting

        total = 1.0 if self.sum_to == "one" else float(len(self.tasks))
        return total * MGDAWeighting(self.epsilon, self.max_iters)(gramian)
