"""MetaBalance: auxiliary gradients brought near the main task's magnitude, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.task_pass import TaskPass


class MetaBalance(JacobianPolicy):
    """The sum of task gradients, each scaled in every parameter tensor towards the main task's
    norm: g_t (relax m_main / m_t + 1 - relax), m a moving average of norms.

    Where the main task's average is zero the others keep the share 1 - relax; before it was ever
    present all keep their size, and in batches without it its past average rules. A zero gradient
    stays zero; all other gradients are fine.

    Args:
        tasks, seed: as for every policy.
        main: the task whose norms the others are brought near.
        relax: 1 gives all the main task's norm, 0 is EW on the shared parameters.
        beta: decay of the averages.

    Source:
        He et al., WWW 2022, arXiv:2203.06801, and its code: relax 0.7, beta 0.9. The averages start
        at zero and divide by 1 - beta^(number of averages), by task; the code does not divide, but
        its ratios are the same as long as all tasks are present. Heads have weight 1 (the code
        balances what its user hands over; the paper, the shared bottom). State: [T, tensors]
        averages and their counts.
    """

    name = "MetaBalance"
    remembered = ("norms", "num_averaged")

    def __init__(
        self, tasks: Sequence[str], *, seed: int, main: str, relax: float, beta: float
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.main = self.tasks.index(main)
        self.relax, self.beta = relax, beta
        self.norms: Tensor | None = None
        self.num_averaged = torch.zeros(len(tasks), dtype=torch.float64)

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        sizes = [parameter.numel() for parameter in task_pass.shared]
        blocks = jacobian.split(sizes, dim=1)
        norms = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks]
        found = torch.stack(norms, dim=1).cpu()
        if self.norms is None:
            self.norms = found.new_zeros(len(self.tasks), len(sizes))
        self.norms[tasks] = self.beta * self.norms[tasks] + (1 - self.beta) * found
        self.num_averaged[tasks] += 1
        if self.num_averaged[self.main] == 0:
            return jacobian.sum(dim=0)
        averages = self.norms / (1 - self.beta**self.num_averaged)[:, None]
        ratios = averages[self.main] / torch.where(averages > 0, averages, 1.0)
        scales = (self.relax * ratios + 1 - self.relax)[tasks].to(jacobian)
        return torch.cat([scale @ block for scale, block in zip(scales.T, blocks, strict=True)])
