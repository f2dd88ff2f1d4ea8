"""MetaBalance: auxiliary gradients brought near the main task's magnitude, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Decay, Fraction, OneTask
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.jacobian import JacobianPolicy


@dataclass(kw_only=True, eq=False)
class MetaBalance(JacobianPolicy):
    """The sum of task gradients, each scaled in every parameter tensor towards the main task's
    norm: g_t (relax m_main / m_t + 1 - relax), m a moving average of norms.

    Where the main task's average is zero the others keep the share 1 - relax. Before it was ever
    present all keep their size, and in batches without it its past average counts. A zero gradient
    stays zero; all other gradients are fine. `combine` takes all columns for one tensor.

    Args:
        main: the task whose norms the others are brought near.
        relax: 1 gives all the main task's norm, 0 is EW on the shared parameters.
        beta: decay of the averages.

    Source:
        He et al., WWW 2022, arXiv:2203.06801, and its code: relax 0.7, beta 0.9. The averages start
        at zero and divide by 1 - beta^(number of averages), per task; the code does not divide, but
        its ratios are the same as long as all tasks are present. Heads have weight 1 (the code
        balances what its user gives it; the paper, the shared bottom). State: [T, tensors]
        averages and their counts.
    """

    main: OneTask = None
    relax: Fraction = 0.7
    beta: Decay = 0.9

    name = "MetaBalance"
    state_names = ("norms", "num_averaged")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.norms: Tensor | None = None
        self.num_averaged = torch.zeros(len(self.tasks), dtype=torch.float64)

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        tasks, main = inputs.tasks, self.tasks.index(self.main)
        blocks = jacobian.split(list(inputs.sizes), dim=1)
        norms_by_block = [
            torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks
        ]
        norms = torch.stack(norms_by_block, dim=1).cpu()
        if self.norms is None:
            self.norms = norms.new_zeros(len(self.tasks), len(blocks))
        self.norms[tasks] = self.beta * self.norms[tasks] + (1 - self.beta) * norms
        self.num_averaged[tasks] += 1
        if self.num_averaged[main] == 0:
            return jacobian.sum(dim=0)
        averages = self.norms / (1 - self.beta**self.num_averaged)[:, None]
        ratios = averages[main] / torch.where(averages > 0, averages, 1.0)
        scales = (self.relax * ratios + 1 - self.relax)[tasks].to(jacobian)
        return torch.cat([scale @ block for scale, block in zip(scales.T, blocks, strict=True)])
