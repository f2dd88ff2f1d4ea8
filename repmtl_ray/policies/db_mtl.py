"""DB-MTL: logarithms of the losses, and moving averages of their gradients at one norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Decay, NonNegative
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.jacobian import JacobianPolicy


@dataclass(kw_only=True, eq=False)
class DBMTL(JacobianPolicy):
    """DB-MTL: the sum of averaged gradients of log L_t, each scaled to the largest of their norms.

    Needs positive losses: it takes their logarithm, whether or not the run trains on it. An absent
    task's average waits. An average that is zero stays zero; opposed ones of equal size cancel.

    Args:
        beta: share of the old average; a task's k-th is beta / k^beta_sigma.
        beta_sigma: 0 keeps the share.

    Source:
        Lin et al., "Dual-balancing for multi-task learning", arXiv:2308.12029, algorithm 1;
        beta 0.9, beta_sigma 0 as in LibMTL. The paper searches beta from 0.1 to 0.9, and beta_sigma
        0.5, per benchmark. Deviations: a task's average starts at its first gradient and its count
        is its own (LibMTL starts at zero, so that the first update is beta short, and an absent
        task's would fade); the logarithm has no 1e-8 inside. Heads follow log L_t. State: the
        [T, N] averages (T times the shared parameters), counts.
    """

    beta: Decay = 0.9
    beta_sigma: NonNegative = 0.0

    name = "DB-MTL"
    needs_positive_losses = True
    state_names = ("averages", "num_averaged")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.averages: Tensor | None = None
        self.num_averaged = torch.zeros(len(self.tasks), dtype=torch.float64)

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        tasks, to_log = inputs.tasks, inputs.to_log.to(jacobian)
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

    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        return self._spread(inputs.to_log, inputs.tasks, absent=1.0)
