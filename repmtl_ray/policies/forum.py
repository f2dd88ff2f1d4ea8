"""FORUM: a fully first-order bilevel method for several outer losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Positive, PositiveInt
from repmtl_ray.policies.bilevel import (
    BilevelPolicy,
    combined_rows,
    gradient_of,
    products,
    rows_of,
    softmax_slopes,
)
from repmtl_ray.policies.simplex import shares_among, with_shares
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class FORUM(BilevelPolicy):
    """Model and a together follow sum_t lam_t F_t + nu q: outer gradients of length 1, and the
    gradient q of how far the inner weighted loss is above what some steps make of it.

    q = grad f(a, th) - (grad_a f(a, z), 0), where f is the inner weighted loss and z is th after
    `inner_steps` steps of gradient descent on it. (lam, nu) solve: min |sum_t lam_t F_t + nu q|^2 -
    nu pull |q|^2 over the simplex and nu >= sum_t lam_t pi_t, with pi_t = pull - q . F_t / |q|^2.
    lam is averaged over steps, the new one with the share (epoch + 1)^(-3/4), and nu = max(sum_t
    lam_t pi_t, 0) for the average.

    Args:
        pull: phi, how fast the inner problem is to be solved.
        inner_learning_rate, inner_steps: of the descent to z.

    Source:
        Ye, Lin, Zhang et al., "A first-order multi-gradient algorithm for multi-objective bi-level
        optimization", ECAI 2024, arXiv:2401.09257, as in LibMTL (pull 0.1, 5 inner steps of rate
        0.1, outer rate 0.001). LibMTL takes halves of the training batch, which is outer="train".
        The small problem is solved by quadprog; a step whose solver fails keeps the averaged lam. The
        outer loss of an absent task takes no part. State: a, its Adam, lam, epoch, failures. Costs
        1 + `inner_steps` forward passes beside the step's own (1 more with outer="train"), and T +
        1 + `inner_steps` encoder backwards.
    """

    pull: Positive = 0.1
    inner_learning_rate: Positive = 0.1
    inner_steps: PositiveInt = 5

    name = "FORUM"
    libraries = ("quadprog",)
    state_names = ("logits", "shares", "epoch", "solver_failures")

    def __post_init__(self) -> None:
        super().__post_init__()
        num_tasks = len(self.tasks)
        self.shares = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
        self.epoch = 0
        self.solver_failures = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def backward(self, task_pass: TaskPass) -> None:
        tasks = task_pass.present.cpu().nonzero().flatten()
        self._inputs_of(task_pass)
        weights = self.weights_of(tasks)
        total = [torch.zeros_like(parameter) for parameter in task_pass.parameters]
        if len(tasks):
            inner, slopes = self._inner_excess(task_pass, weights, tasks)
            with self.look_outside(task_pass) as there:
                outer = rows_of(there)
            self.require_finite(outer)
            lengths = products(outer, outer).diagonal().sqrt()
            scales = torch.where(lengths > 0, 1 / lengths, 0.0)
            outer = [scales.to(block)[:, None] * block for block in outer]
            shares, nu = self._weigh(outer, inner, slopes, tasks)
            combined = combined_rows(task_pass, outer, shares)
            total = [of_outer + nu * part for of_outer, part in zip(combined, inner, strict=True)]
            self.logits.step(nu * slopes, tasks)
        num_shared = len(task_pass.shared)
        task_pass.finish_with_direction(
            torch.cat([part.reshape(-1) for part in total[:num_shared]]),
            torch.zeros_like(weights),
            added_to_heads=total[num_shared:],
        )
        self.last_weights = self.last_head_weights = weights
        self.step += 1

    def _inner_excess(
        self, task_pass: TaskPass, weights: Tensor, tasks: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """q: by parameter, and [P] by a."""
        with self.look_inside(task_pass) as here:
            before, inner = here.losses, gradient_of(here, weights)
        moves = [-self.inner_learning_rate * part for part in inner]
        for number in range(self.inner_steps):
            with self.look_inside(task_pass, moves) as there:
                after = there.losses
                if number < self.inner_steps - 1:
                    slope = gradient_of(there, weights)
                    pairs = zip(moves, slope, strict=True)
                    moves = [move - self.inner_learning_rate * part for move, part in pairs]
        fall = (before - after).double().cpu()[tasks]
        return inner, softmax_slopes(weights[tasks]) @ fall

    def _weigh(
        self, outer: list[Tensor], inner: list[Tensor], slopes: Tensor, tasks: Tensor
    ) -> tuple[Tensor, float]:
        """[T] averaged lam of the present tasks, and nu."""
        flat = torch.cat([part.reshape(-1) for part in inner]).to(outer[0])
        split = flat.split([block.shape[1] for block in outer])
        towards = sum(
            (
                (block.double() @ part.double()).cpu()
                for block, part in zip(outer, split, strict=True)
            ),
            torch.zeros(len(self.tasks), dtype=torch.float64),
        )[tasks]
        square = float(flat.double().square().sum()) + float(slopes.square().sum())
        pi = self.pull - towards / (square + 1e-8)
        gramian = products(outer, outer)[tasks][:, tasks]
        shares = shares_among(self.shares, tasks)
        solved = self._solved(gramian, towards, square, pi)
        if solved is not None:
            rate = (self.epoch + 1) ** -0.75
            shares = (1 - rate) * shares + rate * solved
        self.shares = with_shares(self.shares, shares, tasks)
        nu = max(float(shares @ pi), 0.0)
        return self._spread(shares, tasks, absent=0.0), nu

    def _solved(self, gramian: Tensor, towards: Tensor, square: float, pi: Tensor) -> Tensor | None:
        """[P] lam; None if the solver fails."""
        import numpy as np
        import quadprog

        # In units of |q|, so that the numbers of the problem are of one size.
        num_tasks, size = len(pi), square**0.5 or 1.0
        matrix = np.zeros((num_tasks + 1, num_tasks + 1))
        matrix[:-1, :-1] = gramian.numpy()
        matrix[:-1, -1] = matrix[-1, :-1] = (towards / size).numpy()
        matrix[-1, -1] = 1.0
        linear = np.zeros(num_tasks + 1)
        linear[-1] = self.pull * size / 2
        constraints = np.zeros((num_tasks + 1, num_tasks + 2))
        constraints[:-1, 0] = 1  # sum to 1
        constraints[:-1, 1] = -pi.numpy() * size  # nu >= lam . pi
        constraints[-1, 1] = 1
        constraints[:-1, 2:] = np.eye(num_tasks)  # lam >= 0
        bounds = np.zeros(num_tasks + 2)
        bounds[0] = 1
        ridge = 1e-10 * np.eye(num_tasks + 1)
        try:
            solution = quadprog.solve_qp(matrix + ridge, linear, constraints, bounds, 1)[0]
        except ValueError:  # "constraints are inconsistent" or "matrix G is not positive definite"
            self.solver_failures += 1
            return None
        lam = torch.from_numpy(solution[:-1]).clamp(min=0)
        return lam / lam.sum()

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"solver_failures": float(self.solver_failures)}
