"""ExcessMTL: robust multi-task learning with excess risks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import NonNegativeInt, Positive
from repmtl_ray.policies.base import StepInputs, weight_metrics
from repmtl_ray.policies.jacobian import JacobianPolicy


@dataclass(kw_only=True, eq=False)
class ExcessMTL(JacobianPolicy):
    """Weights grow with each task's excess risk, estimated by its gradients and their past squares.

    Weights lie on the simplex; absent tasks keep theirs, and the present ones share the rest. A
    zero gradient has no excess risk: its task's weight falls. It does not work at the
    representation, because it estimates the curvature at parameters.

    Args:
        robust_step_size: of the exponentiated step.
        n_warmup_steps: a task's first steps, with weights at rest, whose mean excess risk is its
            baseline; with 0 the first step's is, and counts unscaled. The paper takes 3 epochs'
            steps.

    Source:
        He et al., "Robust multi-task learning with excess risks", ICML 2024, equations 6, 7 and 9,
        as in TorchJD, but baselines and their counts are kept per task: TorchJD would give an absent
        task a baseline of zero. State: the [T, N] sums of squares (T times the shared parameters),
        weights, baselines, counts.
    """

    robust_step_size: Positive = 1.0
    n_warmup_steps: NonNegativeInt = 0

    name = "ExcessMTL"
    state_names = ("squares", "log_weights", "baselines", "num_seen")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.squares: Tensor | None = None
        self.log_weights = torch.zeros(len(self.tasks), dtype=torch.float64)
        self.baselines = torch.zeros_like(self.log_weights)
        self.num_seen = torch.zeros_like(self.log_weights)

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        tasks = inputs.tasks
        excess = self._excess_risk(jacobian, tasks)
        num_baseline = max(self.n_warmup_steps, 1)
        num_seen = self.num_seen[tasks]
        is_baseline = num_seen < num_baseline
        scaled = torch.where(is_baseline, excess, excess / (self.baselines[tasks] + 1e-7))
        self.baselines[tasks] += torch.where(is_baseline, excess / num_baseline, 0.0)
        self.num_seen[tasks] += 1
        at_rest = num_seen < self.n_warmup_steps
        growth = torch.where(at_rest, 0.0, self.robust_step_size * scaled)
        log_total = torch.logsumexp(self.log_weights[tasks], dim=0)
        self.log_weights[tasks] = (self.log_weights[tasks] + growth).log_softmax(dim=0) + log_total
        shares = self.log_weights[tasks].softmax(dim=0)
        return shares.to(jacobian) @ jacobian

    def _excess_risk(self, jacobian: Tensor, tasks: Tensor) -> Tensor:
        """[P] equation 6, after adding the squared gradients to the sums."""
        if self.squares is None:
            self.squares = jacobian.new_zeros(len(self.tasks), jacobian.shape[1])
        self.squares = self.squares.to(jacobian)
        excess = []
        for task, row in zip(tasks.tolist(), jacobian, strict=True):
            square = row * row
            self.squares[task] += square
            excess.append((square / (self.squares[task] + 1e-7).sqrt()).sum())
        return torch.stack(excess).double().cpu()

    def metrics(self) -> dict[str, float]:
        return weight_metrics(self.tasks, self.log_weights.softmax(dim=0))
