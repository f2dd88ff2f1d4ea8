"""Gradient policies that ask an outside solver: CAGrad, Nash-MTL, FairGrad, UPGrad and DualProj.

A solver may fail. Such a step takes equal weights 1/P (Nash-MTL: its previous weights), counts as
`solver_failures` in the metrics and in the state, and is logged the first time. What holds for all
Gramian policies is in `gramian.py`. Every policy here allows `gradients="representation"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.lazy import LazyModule

if TYPE_CHECKING:
    from torchjd import aggregation, linalg
    from torchjd.linalg import QuadprogProjector
else:
    aggregation = LazyModule("torchjd.aggregation")
    linalg = LazyModule("torchjd.linalg")


class CAGrad(GramianPolicy):
    """Near the mean gradient, the direction that serves the worst task best.

    A zero gradient, or opposed ones of equal size, make the shared update zero.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        c: radius of the search, by the mean gradient's norm.
        scale: multiplies the weights. 1 is the paper's: g_0 + c |g_0| g_w / |g_w|, g_0 the
            mean. The official code takes 1 / (1 + c^2), nash-mtl's T / (1 + c^2).
        norm_eps: g_w counts as zero below it, relative to the root of the summed squared norms.

    Source:
        Liu et al., NeurIPS 2021, algorithm 1. c is 0.4 in nash-mtl and FAMO (0.5 in LibMTL). Solved
        by CLARABEL. State: the count of failures.
    """

    name = "CAGrad"
    solver = "CLARABEL"

    def __init__(
        self, tasks: Sequence[str], *, c: float, scale: float, norm_eps: float, **common: Any
    ) -> None:
        super().__init__(tasks, **common)
        self.scale = scale
        self.weighting = aggregation.CAGradWeighting(c, norm_eps)

    def _solver_errors(self) -> tuple[type[Exception], ...]:
        from cvxpy.error import SolverError

        return (*super()._solver_errors(), SolverError)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self.scale * self.weighting(gramian)

    def _fall_back(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self.scale * super()._fall_back(gramian, tasks)


class NashMTL(GramianPolicy):
    """The Nash bargaining solution: G alpha = 1 / alpha, by a sequence of convex problems.

    A task with a zero gradient has no solution: it gets weight 0 and keeps its previous alpha.
    Opposed gradients have none either: a failure. On failure alpha stays where the last solved
    problem left it, this step's or an earlier one's; before any it is 1. With one gradient left,
    alpha is 1 / its norm.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        max_norm: of the combined gradient, which is shortened to it; 0 does not.
        update_weights_every: steps between two solutions; in between, alpha stays.
        optim_niter: convex problems a step.

    Source:
        Navon et al., ICML 2022, algorithm 1; problem, stopping rule and defaults of its code,
        solved by ECOS. Deviations: the problem is set at ||G|| = 1 and alpha scaled back, which the
        equation allows exactly (the code mixes raw and normalised scale: at gradient norms of 10 it
        misses the solution, at 1e-6 it finds none); where the problems that start at the previous
        alpha end without a solution (one step in 30, T = 3), they start once more at 1; if that
        ends so too, the step counts as failed (the code swallows it); heads have weight 1 (the code
        weighs them too). State: alpha, failures, step.
    """

    name = "Nash-MTL"
    solver = "ECOS"
    scale_free = False
    remembered = ("alpha",)

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        max_norm: float,
        update_weights_every: int,
        optim_niter: int,
        **common: Any,
    ) -> None:
        super().__init__(tasks, **common)
        self.max_norm = max_norm
        self.update_weights_every = update_weights_every
        self.optim_niter = optim_niter
        self.alpha = torch.full((len(tasks),), torch.nan, dtype=torch.float64)
        self._solvers: dict[int, Any] = {}

    def _solver_errors(self) -> tuple[type[Exception], ...]:
        from cvxpy.error import SolverError

        return (*super()._solver_errors(), SolverError)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        active = gramian.diagonal() > 0
        if self.step % self.update_weights_every == 0:
            self._solve(gramian[active][:, active], tasks[active])
        return self._clipped(gramian, tasks)

    def _fall_back(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self._clipped(gramian, tasks)

    def _clipped(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        alpha = torch.where(gramian.diagonal() > 0, self.alpha[tasks].nan_to_num(nan=1.0), 0.0)
        norm = (alpha @ gramian @ alpha).clamp(min=0).sqrt()
        return alpha * self.max_norm / norm if 0 < self.max_norm < norm else alpha

    def _solve(self, gramian: Tensor, tasks: Tensor) -> None:
        """Moves alpha of the tasks with a gradient; raises if the last convex problem failed."""
        size = gramian.norm().sqrt()
        if len(tasks) == 1:
            self.alpha[tasks] = 1 / size
            return
        eigenvalues, vectors = torch.linalg.eigh(gramian / size**2)
        rows = vectors * eigenvalues.clamp(min=0).sqrt()  # rows @ rows.T is the Gramian of norm 1
        ones = torch.ones(len(tasks), dtype=torch.float64)
        starts = [torch.where(self.alpha[tasks].isnan(), ones, self.alpha[tasks] * size), ones]
        for start in starts:
            alpha, is_solved = self._problems(rows, start)
            if not torch.equal(alpha, start):
                self.alpha[tasks] = alpha / size
            if is_solved:
                return
        raise ArithmeticError(f"a convex problem of {len(tasks)} tasks has no solution")

    def _problems(self, rows: Tensor, start: Tensor) -> tuple[Tensor, bool]:
        """Alpha after the convex problems from `start`, and whether the last one had a solution."""
        solver = self._solver(len(start))
        solver.prvs_alpha = start.numpy()
        solver(rows)
        alpha = torch.from_numpy(solver.prvs_alpha).double()
        if not bool((alpha.isfinite() & (alpha > 0)).all()):
            return start, False
        last, before = solver.alpha_param.value, solver.prvs_alpha_param.value
        return alpha, last is not None and bool((last != before).any())  # TorchJD swallows errors

    def _solver(self, num_tasks: int) -> Any:
        """TorchJD's weighting for so many tasks, about to solve; compiled once."""
        if num_tasks not in self._solvers:
            weighting = aggregation.NashMTL(num_tasks, 0.0, 1, self.optim_niter).weighting
            weighting._init_optim_problem()
            weighting.step = 1.0
            self._solvers[num_tasks] = weighting
        return self._solvers[num_tasks]


class FairGrad(GramianPolicy):
    """Alpha-fair resource allocation: G x = x^(-1 / alpha).

    A task with a zero gradient has no solution and gets weight 0. Opposed gradients have none
    either: the weights are where least squares stops, finite.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        alpha: 0 is the mean, 1 proportional fairness, large the worst task's.
        max_iters: of least squares; None is 100 times T.

    Source:
        Ban and Ji, ICML 2024, arXiv:2402.15638, equation 4; alpha 2 on NYUv2 and Cityscapes. Solved
        at trace 1 and scaled back by trace^(-alpha / (1 + alpha)), which the equation allows
        exactly. Solved by scipy's least_squares. State: the count of failures.
    """

    name = "FairGrad"
    solver = "scipy.optimize.least_squares"
    scale_free = False

    def __init__(
        self, tasks: Sequence[str], *, alpha: float, max_iters: int | None, **common: Any
    ) -> None:
        super().__init__(tasks, **common)
        self.weighting = aggregation.FairGradWeighting(alpha, max_iters)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        active, trace, alpha = gramian.diagonal() > 0, gramian.trace(), self.weighting.alpha
        weights = torch.zeros(len(tasks), dtype=torch.float64)
        weights[active] = self.weighting(gramian[active][:, active] / trace)
        return weights * trace ** (-alpha / (1 + alpha))


class UPGrad(GramianPolicy):
    """Every gradient projected so that it harms no task, then the mean.

    Opposed gradients cancel, up to `reg_eps`; zero and dependent ones are fine.

    Args:
        tasks, seed, at_representation, momentum_of_weights: as for every Gramian policy.
        reg_eps: added to the diagonal of the Gramian, relative to its trace, so that it can be
        solved.

    Source:
        Quinton and Rey, "Jacobian descent for multi-objective optimization", arXiv:2406.16232.
        Solved by quadprog. State: the count of failures.
    """

    name = "UPGrad"
    solver = "quadprog"

    def __init__(self, tasks: Sequence[str], *, reg_eps: float, **common: Any) -> None:
        super().__init__(tasks, **common)
        self.weighting = self._weighting(linalg.QuadprogProjector(reg_eps=reg_eps))

    def _weighting(self, projector: QuadprogProjector) -> Any:
        return aggregation.UPGradWeighting(projector=projector)

    def _weights(self, gramian: Tensor, tasks: Tensor) -> Tensor:
        return self.weighting(gramian)


class DualProj(UPGrad):
    """The mean gradient, projected so that it harms no task.

    Opposed gradients cancel, up to `reg_eps`; zero and dependent ones are fine.

    Args:
        tasks, seed, at_representation, momentum_of_weights, reg_eps: as for UPGrad.

    Source:
        Lopez-Paz and Ranzato, "Gradient episodic memory", NeurIPS 2017, equation 11. Solved by
        quadprog. State: the count of failures.
    """

    name = "DualProj"

    def _weighting(self, projector: QuadprogProjector) -> Any:
        return aggregation.DualProjWeighting(projector=projector)
