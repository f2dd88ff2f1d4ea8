"""Every touch of TorchJD's private state, in one place.

Owns functions that put a policy's state into one of TorchJD's objects, run it, and take the state
out again. TorchJD keeps such state in attributes with a leading underscore; its own `state_dict`
does not hold them, and its counts are common to all tasks, which absent tasks forbid. Checked with
TorchJD 0.18: look at every function here before another version is allowed in pyproject.toml.
Methods that need only TorchJD's public objects import those themselves.

Imports of TorchJD are inside the functions, here and in the methods: it loads cvxpy and scipy, which
takes two seconds in every process, and most policies need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchjd.scalarization import Scalarizer


def derivatives_of(scalarizer: Scalarizer, losses: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The scalarizer's derivatives by the losses and by `others`."""
    with torch.enable_grad():
        losses = losses.detach().requires_grad_()
        return torch.autograd.grad(scalarizer(losses), (losses, *others))


def dwa(losses: Tensor, last_means: Tensor, earlier_means: Tensor, temperature: float) -> Tensor:
    """[P] weights of dynamic weight average from two epochs' mean losses.

    The private list is set because TorchJD fills it by epochs that are common to all tasks.
    """
    from torchjd.scalarization import DWA

    scalarizer = DWA(temperature)
    scalarizer._previous_averages = [earlier_means, last_means]
    return derivatives_of(scalarizer, losses)[0]


def famo(losses: Tensor, logits: Tensor) -> Tensor:
    """[P] weights of FAMO from its logits.

    The private parameter is set because TorchJD learns it by an Adam that moves absent tasks too.
    """
    from torchjd.scalarization import FAMO

    scalarizer = FAMO(len(losses))
    scalarizer._w.data = logits
    return derivatives_of(scalarizer, losses)[0]


def gradvac(gramian: Tensor, cosines: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor]:
    """[P] weights of GradVac, and its [P, P] average cosines after the step.

    The private averages are set because TorchJD forgets them when the number of tasks changes.
    """
    from torchjd.aggregation import GradVacWeighting

    weighting: Any = GradVacWeighting(beta, eps)
    weighting._phi_t = cosines.clone()
    weighting._state_key = (len(cosines), cosines.dtype)
    return weighting(gramian), weighting._phi_t


def pcd(gramian: Tensor, scales: Tensor, tau: float) -> Tensor:
    """[P] weights of priority-constrained descent; the first task is the primary one.

    The private step is replaced because TorchJD's average of squared norms has one step count for
    all tasks; here the scales come from averages per task.
    """
    from torchjd.aggregation import PCDWeighting

    weighting: Any = PCDWeighting(tau)
    weighting._update_scales = lambda _squared_norms: scales
    return weighting(gramian)


def modo(products: Tensor, shares: Tensor, gamma: float, rho: float) -> Tensor:
    """[P] shares of MoDo after a step from `shares`; state as for `gradvac`."""
    from torchjd.aggregation import MoDoWeighting

    weighting: Any = MoDoWeighting(gamma, rho)
    weighting._lambda = shares
    weighting._state_key = (len(shares), products.dtype, products.device)
    return weighting(products)


def sdmgrad(
    products: Tensor,
    shares: Tensor,
    *,
    learning_rate: float,
    momentum: float,
    num_iterations: int,
    lambda_: float,
) -> tuple[Tensor, Tensor]:
    """[P] shares of SDMGrad after its descent from `shares`, and [P] weights; state as for
    `gradvac`."""
    from torchjd.aggregation import SDMGradWeighting

    weighting: Any = SDMGradWeighting(learning_rate, momentum, num_iterations, lambda_)
    weighting._w = shares
    weighting._state_key = (len(shares), products.dtype, products.device)
    weights = weighting(products)
    return weighting._w, weights


def project_onto_simplex(values: Tensor) -> Tensor:
    """[P] the nearest point whose entries are not negative and sum to 1.

    TorchJD has the function in a private module only.
    """
    from torchjd.aggregation._utils import simplex

    return simplex.project_onto_simplex(values)


class NashBargaining:
    """The convex problems of Nash-MTL for a number of tasks, compiled once.

    TorchJD's aggregator hides a failed problem and its alpha, and counts steps of its own; its
    weighting is private. This class starts the problems at any alpha and says whether they ended
    with a solution.

    Args:
        num_tasks: T.
        optim_niter: convex problems per solution, at most.
    """

    def __init__(self, num_tasks: int, optim_niter: int) -> None:
        import cvxpy  # noqa: F401 -- TorchJD hides why it cannot be loaded
        from torchjd.aggregation import NashMTL

        self._weighting: Any = NashMTL(num_tasks, 0.0, 1, optim_niter).weighting
        self._weighting._init_optim_problem()
        self._weighting.step = 1.0  # at 0 it would compile the problem again

    def solve(self, rows: Tensor, start: Tensor) -> tuple[Tensor, bool]:
        """[T] alpha after the convex problems, and whether the last one had a solution.

        Args:
            rows: [T, T], whose inner products are the Gramian, of norm 1.
            start: [T] alpha to start at.
        """
        weighting = self._weighting
        weighting.prvs_alpha = start.numpy()
        weighting(rows)
        alpha = torch.from_numpy(weighting.prvs_alpha).double()
        if not bool((alpha.isfinite() & (alpha > 0)).all()):
            return start, False
        # TorchJD answers a solver's error by writing the previous alpha over the solution.
        last, previous = weighting.alpha_param.value, weighting.prvs_alpha_param.value
        return alpha, last is not None and bool(np.any(last != previous))
