"""Gradient policies in closed form or by a few iterations: TorchJD's weightings on the Gramian.

Each finds [P] weights for the P present tasks; what becomes of them is in `gramian.py`, and so is
what holds for all (heads' weights, absent tasks, all gradients zero, momentum). Every policy here
allows `gradients="representation"`. The ones that call an outside solver are in
`torchjd_solvers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repmtl_ray.policies.gramian import CPU, GramianPolicy
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.refusals import SMALLEST_LOSS
from repmtl_ray.policies.task_pass import TaskPass

if TYPE_CHECKING:
    from torchjd import aggregation
else:
    aggregation = LazyModule("torchjd.aggregation")


class MGDA(GramianPolicy):
    """The point of smallest norm among all convex combinations of task gradients.

    A zero gradient, or opposed ones, make the shared update zero: there is no common descent.
    Parallel gradients give the shortest.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
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

    name = "MGDA"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        normalization: str,
        sum_to: str,
        epsilon: float,
        max_iters: int,
        **common: Any,
    ) -> None:
        super().__init__(tasks, **common)
        self.normalization = normalization
        self.total = {"one": 1.0, "tasks": float(len(tasks))}[sum_to]
        self.weighting = aggregation.MGDAWeighting(epsilon, max_iters)

    def _normalized(self, gramian: Tensor, task_pass: TaskPass) -> Tensor:
        size = torch.ones(len(gramian), dtype=torch.float64)
        if self.normalization in ("l2", "loss+"):
            norms = gramian.diagonal().sqrt()
            size = torch.where(norms > 0, norms, 1.0)
        if self.normalization in ("loss", "loss+"):
            size = size * task_pass.plain_losses.detach().cpu().double().clamp(min=SMALLEST_LOSS)
        return gramian / torch.outer(size, size)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self.total * self.weighting(gramian)


class PCGrad(GramianPolicy):
    """Each gradient loses its part against every conflicting other, in random order; their sum.

    Opposed gradients cancel to zero; a zero gradient takes no part; parallel ones are summed.

    Source:
        Yu et al., "Gradient surgery", NeurIPS 2020, algorithm 1. State: none but the step.
    """

    name = "PCGrad"

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        with self._drawing(CPU):
            return aggregation.PCGradWeighting()(gramian)


class GradVac(GramianPolicy):
    """Each gradient is turned until its cosine with every other reaches that pair's moving average.

    Opposed gradients cancel at first; a zero gradient takes no part. Where a pair has been parallel
    for long (average near 1) the correction is large, at most of the order of 1 / eps.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        beta: share of the new cosine in the average.
        eps: added to denominators, relative to the root of the summed squared norms.

    Source:
        Wang et al., "Gradient vaccine", ICLR 2021, equations 3 and 4, whole-model grouping;
        averages start at 0. State: the [T, T] averages.
    """

    name = "GradVac"
    remembered = ("cosines",)

    def __init__(self, tasks: Sequence[str], *, beta: float, eps: float, **common: Any) -> None:
        super().__init__(tasks, **common)
        self.weighting: Any = aggregation.GradVacWeighting(beta, eps)
        self.cosines = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        pairs = torch.meshgrid(tasks, tasks, indexing="ij")
        self.weighting._phi_t = self.cosines[pairs]
        self.weighting._state_key = (len(tasks), torch.float64)
        with self._drawing(CPU):
            weights = self.weighting(gramian)
        self.cosines[pairs] = self.weighting._phi_t
        return weights


class IMTLG(GramianPolicy):
    """IMTL-G: the combination with equal projections on every task gradient; weights sum to 1.

    A zero gradient has weight 0; dependent gradients go through a pseudo-inverse; where the weights
    would sum to zero (opposed gradients) they are zero. Weights may be negative.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, equation 3, as generalised
        in arXiv:2406.16232. State: none.
    """

    name = "IMTL-G"

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return aggregation.IMTLGWeighting()(gramian)


class AlignedMTL(GramianPolicy):
    """Aligned-MTL: the mean of gradients whose principal components were brought to one size.

    Components with no size (zero, dependent or opposed gradients) are left out.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        scale_mode: the size: the "min", "median" or "rmse" (root mean) singular value.

    Source:
        Senushkin et al., CVPR 2023, algorithm 1, uniform preference; at the representation it is
        their Aligned-MTL-UB. State: none.
    """

    name = "Aligned-MTL"

    def __init__(self, tasks: Sequence[str], *, scale_mode: Any, **common: Any) -> None:
        super().__init__(tasks, **common)
        self.weighting = aggregation.AlignedMTLWeighting(scale_mode=scale_mode)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self.weighting(gramian)


class PCD(GramianPolicy):
    """Priority-constrained descent: the primary task's gradient, bent to help every other task too.

    Where the constraints contradict each other (opposed secondary gradients) the update is the
    primary gradient; where the primary gradient is zero, or its task absent, it is zero.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        primary: the task that leads.
        tau: share of the progress along its own gradient that every other task is granted.
        beta: decay of the average squared norms.
        eps: added to them; absolute, so very small gradients (squared norm near it) are not
        rescaled.

    Source:
        "Not all objectives are born equal", TMLR 2026, arXiv:2606.29521. Averages and their step
        counts are kept by task, so that an absent one's wait; nothing is learnt while the primary
        is absent. State: both.
    """

    name = "PCD"
    scale_free = False
    remembered = ("squared_norms", "num_averaged")

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        primary: str,
        tau: float,
        beta: float,
        eps: float,
        **common: Any,
    ) -> None:
        super().__init__(tasks, **common)
        self.primary = self.tasks.index(primary)
        self.weighting = _ScaledPCD(tau, beta, eps)
        self.squared_norms = torch.zeros(len(tasks), dtype=torch.float64)
        self.num_averaged = torch.zeros_like(self.squared_norms)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        first = tasks == self.primary
        if not bool(first.any()):
            return torch.zeros(len(tasks), dtype=torch.float64)
        order = torch.argsort(first.double(), descending=True, stable=True)
        beta, squares = self.weighting.beta, gramian.diagonal()
        self.squared_norms[tasks] = beta * self.squared_norms[tasks] + (1 - beta) * squares
        self.num_averaged[tasks] += 1
        average = self.squared_norms[tasks] / (1 - beta ** self.num_averaged[tasks])
        size = (average + self.weighting.eps).sqrt()
        self.weighting.scales = torch.where(size > 0, 1 / size, 0.0)[order]
        weights = torch.zeros(len(tasks), dtype=torch.float64)
        weights[order] = self.weighting(gramian[order][:, order])
        return weights


class _ScaledPCD(aggregation.PCDWeighting):
    """TorchJD's PCD with scales from outside: its own average has one step count for all tasks."""

    scales: Tensor

    def _update_scales(self, sq_norms: Tensor) -> Tensor:
        return self.scales


class Krum(GramianPolicy):
    """The mean of the gradients that lie closest to their neighbours.

    With fewer present tasks than the method needs (`n_byzantine` + 3, or `n_selected`) it is the
    mean of all present. Any gradients are fine.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        n_byzantine: how many tasks may be outliers.
        n_selected: how many gradients to take.

    Source:
        Blanchard et al., "Machine learning with adversaries", NeurIPS 2017. State: none.
    """

    name = "Krum"

    def __init__(
        self, tasks: Sequence[str], *, n_byzantine: int, n_selected: int, **common: Any
    ) -> None:
        super().__init__(tasks, **common)
        self.weighting = aggregation.KrumWeighting(n_byzantine, n_selected)
        self.num_needed = max(n_byzantine + 3, n_selected)
        if len(tasks) < self.num_needed:
            raise ValueError(
                f"n_byzantine={n_byzantine} and n_selected={n_selected} need at least "
                f"{self.num_needed} tasks, found {len(tasks)}"
            )

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        if len(tasks) < self.num_needed:
            return self._fall_back(gramian, tasks)
        return self.weighting(gramian)


class ConFIG(GramianPolicy):
    """The direction with equal cosines to all gradients, as long as all their projections on it.

    Zero gradients are left out; dependent ones go through a pseudo-inverse; opposed ones give zero.

    Source:
        Liu et al., "ConFIG", arXiv:2408.11104, equation 2. TorchJD's works on the Jacobian by a
        singular value decomposition of [T, P]; here the same weights come from the [T, T] cosines.
        State: none.
    """

    name = "ConFIG"

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        norms = gramian.diagonal().sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        cosines = gramian * torch.outer(inverse, inverse)
        target = (norms > 0).double()
        weights = inverse * (torch.linalg.pinv(cosines, rtol=1e-12, hermitian=True) @ target)
        square = weights @ gramian @ weights
        length = (gramian @ weights).sum()
        return torch.where(square > 1e-24, weights * length / square, 0.0)


class RGW(GramianPolicy):
    """Random weights on task gradients, drawn anew each step: the softmax of T normal numbers.

    As RLW, but heads keep weight 1. At the representation it costs one encoder backward. All T
    numbers are drawn whoever is present.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        sum_to: "one", as in the paper, or "tasks": T times that.

    Source:
        Lin et al., arXiv:2111.10603, algorithm 2, on gradients. State: none but the step.
    """

    name = "RGW"

    def __init__(self, tasks: Sequence[str], *, sum_to: str, **common: Any) -> None:
        super().__init__(tasks, **common)
        self.total = {"one": 1.0, "tasks": float(len(tasks))}[sum_to]

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        everyone = torch.zeros(len(self.tasks), 1, dtype=torch.float64)
        with self._drawing(CPU):
            return self.total * aggregation.RandomWeighting()(everyone)[tasks]
