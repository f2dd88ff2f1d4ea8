"""Nash-MTL: multi-task learning as a bargaining game."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegative, PositiveInt
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.policies.torchjd_adapter import NashBargaining


@dataclass(kw_only=True, eq=False)
class NashMTL(GramianPolicy):
    """The Nash bargaining solution: G alpha = 1 / alpha, by a sequence of convex problems.

    A task with a zero gradient has no solution: it gets weight 0 and keeps its previous alpha.
    Opposed gradients have none either: a failure. On failure alpha stays where the last solved
    problem left it, this step's or an earlier one's; before any it is 1. With one gradient left,
    alpha is 1 / its norm.

    Args:
        optim_niter: convex problems per step.

    Source:
        Navon et al., ICML 2022, algorithm 1; problem, stopping rule and defaults of its code,
        solved by ECOS. Deviations: the problem is set at ||G|| = 1 and alpha scaled back, which the
        equation allows exactly (the code mixes raw and normalised scale: at gradient norms of 10 it
        misses the solution, at 1e-6 it finds none); where the problems that start at the previous
        alpha end without a solution (one step in 30, T = 3), they start once more at 1; if that
        fails too, the step counts as failed (the code hides it). The combined gradient is shortened
        to `max_norm`; heads train on the weighted losses, not shortened, as in the code and in
        LibMTL. State: alpha, failures, step.
    """

    max_norm: NonNegative = 1.0
    optim_niter: PositiveInt = 20

    name = "Nash-MTL"
    libraries = ("cvxpy", "ecos")
    weighs_heads = True
    solver = "ECOS"
    scale_free = False
    state_names = ("alpha",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha = torch.full((len(self.tasks),), torch.nan, dtype=torch.float64)
        self._problems: dict[int, NashBargaining] = {}  # by number of tasks

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        has_gradient = gramian.diagonal() > 0
        self._solve(gramian[has_gradient][:, has_gradient], inputs.tasks[has_gradient])
        return self._fall_back(gramian, inputs)

    def _fall_back(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        """[P] alpha as it stands, of the tasks that have a gradient."""
        alpha = self.alpha[inputs.tasks].nan_to_num(nan=1.0)
        return torch.where(gramian.diagonal() > 0, alpha, 0.0)

    def _solve(self, gramian: Tensor, tasks: Tensor) -> None:
        """Moves alpha of the tasks with a gradient; raises if the last convex problem failed."""
        size = gramian.norm().sqrt()
        if len(tasks) == 1:
            self.alpha[tasks] = 1 / size
            return
        eigenvalues, vectors = torch.linalg.eigh(gramian / size**2)
        rows = vectors * eigenvalues.clamp(min=0).sqrt()  # rows @ rows.T is the Gramian of norm 1
        ones = torch.ones(len(tasks), dtype=torch.float64)
        previous = torch.where(self.alpha[tasks].isnan(), ones, self.alpha[tasks] * size)
        if len(tasks) not in self._problems:
            self._problems[len(tasks)] = NashBargaining(len(tasks), self.optim_niter)
        for start in (previous, ones):
            alpha, is_solved = self._problems[len(tasks)].solve(rows, start)
            if not torch.equal(alpha, start):
                self.alpha[tasks] = alpha / size
            if is_solved:
                return
        raise ArithmeticError(f"a convex problem of {len(tasks)} tasks has no solution")
