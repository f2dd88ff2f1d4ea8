"""DB-MTL: logarithms of the losses, and moving averages of their gradients at one norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.refusals import positive_losses
from repmtl_ray.policies.task_pass import TaskPass


class DBMTL(JacobianPolicy):
    """DB-MTL: the sum of averaged gradients of log L_t, each scaled to the largest of their norms.

    Needs positive losses: it takes their logarithm, whether or not the run trains on it. An absent
    task's average waits. An average that is zero stays zero; opposed ones of equal size cancel.

    Args:
        tasks, seed: as for every policy.
        beta: share of the old average; a task's k-th is beta / k^beta_sigma.
        beta_sigma: 0 keeps the share.

    Source:
        Lin et al., "Dual-balancing for multi-task learning", arXiv:2308.12029, algorithm 1;
        beta 0.9, beta_sigma 0 as in LibMTL. The paper searches beta from 0.1 to 0.9, and beta_sigma
        0.5, by benchmark. Deviations: a task's average starts at its first gradient and its count
        is its own (LibMTL starts at zero, so that the first update is beta short, and an absent
        task's would fade); the logarithm has no 1e-8 inside. Heads follow log L_t. State: the
        [T, N] averages (T times the shared parameters), counts.
    """

    name = "DB-MTL"
    needs_positive_losses = True
    remembered = ("averages", "num_averaged")

    def __init__(self, tasks: Sequence[str], *, seed: int, beta: float, beta_sigma: float) -> None:
        super().__init__(tasks, seed=seed)
        self.beta, self.beta_sigma = beta, beta_sigma
        self.averages: Tensor | None = None
        self.num_averaged = torch.zeros(len(tasks), dtype=torch.float64)

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        to_log = self._to_log(task_pass)[tasks].to(jacobian)
        if self.averages is None:
            self.averages = jacobian.new_zeros(len(self.tasks), jacobian.shape[1])
        self.averages = self.averages.to(jacobian)
        self.num_averaged[tasks] += 1
        counts = self.num_averaged[tasks]
        shares = torch.where(counts > 1, self.beta / counts**self.beta_sigma, 0.0)
        norms = []
        for task, row, share, scale in zip(
            tasks.tolist(), jacobian, shares.tolist(), to_log, strict=True
        ):
            self.averages[task].mul_(share).add_(row * scale, alpha=1 - share)
            norms.append(torch.linalg.vector_norm(self.averages[task], dtype=torch.float64))
        size = torch.stack(norms)
        scales = torch.where(size > 0, size.max() / size, 0.0).to(jacobian)
        return scales @ self.averages[tasks]

    def _to_log(self, task_pass: TaskPass) -> Tensor:
        """[T] factors from the pass's gradients to those of log L_t."""
        present = task_pass.present.cpu().nonzero().flatten()
        losses = positive_losses(
            self.name, self.tasks, self.step + 1, task_pass.plain_losses, present
        )
        return torch.ones_like(losses) if task_pass.log_losses else 1 / losses

    def _head_weights(self, task_pass: TaskPass) -> Tensor:
        return self._to_log(task_pass)
