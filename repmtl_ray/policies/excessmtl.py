"""ExcessMTL: robust multi-task learning with excess risks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import HeadWeights, NonNegativeInt, Positive, ScaleOfWeights
from repmtl_ray.policies.base import StepInputs, weight_metrics
from repmtl_ray.policies.jacobian import JacobianPolicy


@dataclass(kw_only=True, eq=False)
class ExcessMTL(JacobianPolicy):
    """Weights grow with each task's excess risk, estimated by its gradients and their past squares.

    Absent tasks keep their weights, and the present ones share the rest. A zero gradient has no
    excess risk: its task's weight falls. It does not work at the representation, because it
    estimates the curvature at parameters.

    Args:
        robust_step_size: of the exponentiated step.
        n_warmup_steps: a task's first steps, with weights at rest, whose mean excess risk is its
            baseline: 1 as in the official code, where the first step's is; the paper takes 3
            epochs' steps. With 0, as by default in TorchJD, the first step's excess risk is the
            baseline and also moves the weights, unscaled.
        sum_to: what the weights sum to: "tasks", as in the official code, or "one", as in TorchJD.
        head_weights: "official" and "weighted": the weights of the tasks, as in the official code;
            "one", as in TorchJD.

    Source:
        He et al., "Robust multi-task learning with excess risks", ICML 2024, equations 6, 7 and 9;
        the defaults are the official code's, and LibMTL's. TorchJD's form is robust_step_size=1.0,
        n_warmup_steps=0, sum_to="one", head_weights="one": with it a single step at the usual size
        of gradients can leave all the weight on one task. Deviations: baselines and their counts
        are kept per task (TorchJD would give an absent task a baseline of zero); 1e-7 is added to a
        baseline that divides. State: the [T, N] sums of squares (T times the shared parameters),
        weights, baselines, counts.
    """

    robust_step_size: Positive = 0.01
    n_warmup_steps: NonNegativeInt = 1
    sum_to: ScaleOfWeights = "tasks"
    head_weights: HeadWeights = "official"

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
        weights = shares * (len(tasks) if self.sum_to == "tasks" else 1)
        self.last_weights = self._spread(weights, tasks, absent=0.0)
        return weights.to(jacobian) @ jacobian

    def _weights_of_heads(self, inputs: StepInputs) -> Tensor:
        if self.head_weights == "one" or self.last_weights is None:
            return super()._weights_of_heads(inputs)
        return self.last_weights

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
