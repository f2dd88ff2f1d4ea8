"""MOML: multi-objective meta-learning of the weights of losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.bilevel import (
    BilevelPolicy,
    combined_rows,
    products,
    rows_of,
    softmax_slopes,
)
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class MOML(BilevelPolicy):
    """a follows a common descent direction of the outer losses after one step of the model on the
    inner ones; then the model follows the training losses with the new weights.

    Outer loss t changes with a by -rate (G_t . g_s)_s J: G_t its gradient after the step, g_s the
    inner gradients before, J the derivatives of the softmax. These T rows are brought to length 1,
    and a follows their convex combination of smallest norm. Where no direction lowers all outer
    losses that is zero, and a stays (with Adam, rounding noise would become whole steps). With two
    tasks the rows are always parallel.

    Args:
        inner_learning_rate: rate of the step inside.

    Source:
        Ye, Lin, Yue, Guo, Xiao and Zhang, "Multi-objective meta learning", NeurIPS 2021, as in
        LibMTL (one inner step of rate 0.1, outer rate 0.001). LibMTL takes halves of the training
        batch, which is outer="train". The combination is found by quadprog, exactly; LibMTL's Frank-Wolfe
        stops near it. State: a, its Adam. Costs 1 forward pass beside the step's
        own (2 with outer="train"), 2 T + 1 encoder backwards, and two Jacobians in memory.
    """

    inner_learning_rate: Positive = 0.1

    name = "MOML"
    libraries = ("quadprog",)

    def backward(self, task_pass: TaskPass) -> None:
        tasks = task_pass.present.cpu().nonzero().flatten()
        self._inputs_of(task_pass)
        if len(tasks):
            weights = self.weights_of(tasks)
            with self.look_inside(task_pass) as here:
                inner = rows_of(here)
            self.require_finite(inner)
            step = combined_rows(task_pass, inner, -self.inner_learning_rate * weights)
            with self.look_outside(task_pass, step) as there:
                outer = rows_of(there)
            self.require_finite(outer)
            slopes = -self.inner_learning_rate * products(outer, inner)[tasks][:, tasks]
            self.logits.step(min_norm(slopes @ softmax_slopes(weights[tasks])), tasks)
        self.finish(task_pass, self.weights_of(tasks))


def min_norm(rows: torch.Tensor) -> torch.Tensor:
    """[P] the convex combination of smallest norm of [P, P] rows that are brought to length 1.

    Rows of zeros stay. A combination shorter than 1e-6 is zero.
    """
    import numpy as np
    import quadprog

    lengths = rows.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, rows / lengths, 0.0)
    size = len(rows)
    gramian = (unit @ unit.T).numpy() + 1e-12 * np.eye(size)
    constraints = np.concatenate([np.ones((size, 1)), np.eye(size)], axis=1)
    bounds = np.concatenate([np.ones(1), np.zeros(size)])
    shares = quadprog.solve_qp(gramian, np.zeros(size), constraints, bounds, 1)[0]
    combined = torch.from_numpy(shares) @ unit
    return torch.where(combined.norm() > 1e-6, combined, 0.0)
