"""Gradient policies that look at every coordinate: GradDrop, TrimmedMean, ExcessMTL.

Their result is no function of inner products, so they keep the [T, P] Jacobian of the shared
parameters and cost one encoder backward a task (`jacobian.py`). Only GradDrop allows
`gradients="representation"`: a trimmed mean of representation gradients would compare coordinates
of single samples, and ExcessMTL estimates the curvature at parameters. Heads have weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repmtl_ray.policies.base import weight_metrics
from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.refusals import refuse_non_finite
from repmtl_ray.policies.task_pass import TaskPass

if TYPE_CHECKING:
    from torchjd import aggregation
else:
    aggregation = LazyModule("torchjd.aggregation")


class GradDrop(JacobianPolicy):
    """At each coordinate one sign is drawn, by its share of the absolute sum; the other is dropped.

    Zero coordinates stay zero; any gradients are fine.

    Args:
        tasks, seed: as for every policy.
        at_representation: draw for the units of the representation, the paper's layer, at the cost
            of one encoder backward in all.
        leak: by task, the share of a dropped gradient that passes all the same.

    Source:
        Chen et al., "Just pick a sign", NeurIPS 2020, algorithm 1. At the representation (LibMTL
        allows that alone) all of it: gradients times the signs of their units, totalled over the
        samples of the global batch, decide; a unit's sign is then dropped or kept in every sample.
        At the shared parameters, the default here as for every gradient policy, lines 10 to 15 on
        their gradients, which have no samples. State: none but the step.
    """

    name = "GradDrop"
    allows_representation = True

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        leak: Sequence[float],
        at_representation: bool = False,
    ) -> None:
        super().__init__(tasks, seed=seed, at_representation=at_representation)
        self.leak = torch.tensor(leak, dtype=torch.float64)

    def backward(self, task_pass: TaskPass) -> None:
        if not self.at_representation:
            super().backward(task_pass)
            return
        signs = task_pass.representation.sign()
        totals = torch.stack([(part * signs).sum(dim=0) for part in task_pass.saliency])
        task_pass.workers.total_([totals])
        finite = totals.isfinite().flatten(1).all(dim=1).cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, finite)
        size = totals.abs().sum(dim=0)
        share = 0.5 * (1 + totals.sum(dim=0) / torch.where(size > 0, size, 1.0))
        with self._drawing(totals.device):
            draw = torch.rand(share.shape, dtype=share.dtype, device=share.device)
        passes = ((share > draw) & (totals > 0)) | ((share < draw) & (totals < 0))
        combined = torch.zeros_like(signs)
        for saliency, leak, kept in zip(task_pass.saliency, self.leak, passes, strict=True):
            combined += saliency * (leak + (1 - leak) * kept).to(saliency)
        task_pass.finish_at_representation(combined, self._head_weights(task_pass))
        self.step += 1

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        aggregator = aggregation.GradDrop(leak=self.leak[tasks].to(jacobian))
        with self._drawing(jacobian.device):
            return aggregator(jacobian)


class TrimmedMean(JacobianPolicy):
    """At each coordinate the mean of the task gradients without the largest and the smallest.

    With fewer than 2 `trim_number` + 1 tasks present it trims as many as leave one (the median).
    Any gradients are fine.

    Args:
        tasks, seed: as for every policy.
        trim_number: how many to leave out at each end.

    Source:
        Yin et al., "Byzantine-robust distributed learning", ICML 2018, definition 2. State: none.
    """

    name = "TrimmedMean"

    def __init__(self, tasks: Sequence[str], *, seed: int, trim_number: int) -> None:
        super().__init__(tasks, seed=seed)
        self.trim_number = trim_number
        if len(tasks) < 2 * trim_number + 1:
            raise ValueError(
                f"trim_number={trim_number} needs at least {2 * trim_number + 1} tasks, found "
                f"{len(tasks)}"
            )

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        trim_number = min(self.trim_number, (len(tasks) - 1) // 2)
        return aggregation.TrimmedMean(trim_number)(jacobian)


class ExcessMTL(JacobianPolicy):
    """Weights grow with each task's excess risk, estimated by its gradients and their past squares.

    Weights lie on the simplex; absent tasks keep theirs, and the present ones share what is left. A
    zero gradient has no excess risk: its task's weight falls.

    Args:
        tasks, seed: as for every policy.
        robust_step_size: of the exponentiated step.
        n_warmup_steps: a task's first steps, with weights at rest, whose mean excess risk is its
            baseline; with 0 the first step's is, and counts unscaled. The paper takes 3 epochs'
            steps.

    Source:
        He et al., "Robust multi-task learning with excess risks", ICML 2024, equations 6, 7 and 9,
        as in TorchJD, but baselines and their counts are kept by task: TorchJD would give an absent
        task a baseline of zero. State: the [T, N] sums of squares (T times the shared parameters),
        weights, baselines, counts.
    """

    name = "ExcessMTL"
    remembered = ("squares", "log_weights", "baselines", "num_seen")

    def __init__(
        self, tasks: Sequence[str], *, seed: int, robust_step_size: float, n_warmup_steps: int
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.robust_step_size = robust_step_size
        self.n_warmup_steps = n_warmup_steps
        self.squares: Tensor | None = None
        self.log_weights = torch.zeros(len(tasks), dtype=torch.float64)
        self.baselines = torch.zeros_like(self.log_weights)
        self.num_seen = torch.zeros_like(self.log_weights)

    def _direction(self, jacobian: Tensor, tasks: Tensor, task_pass: TaskPass) -> Tensor:
        excess = self._excess_risk(jacobian, tasks)
        num_baseline = max(self.n_warmup_steps, 1)
        num_seen = self.num_seen[tasks]
        measuring = num_seen < num_baseline
        scaled = torch.where(measuring, excess, excess / (self.baselines[tasks] + 1e-7))
        self.baselines[tasks] += torch.where(measuring, excess / num_baseline, 0.0)
        self.num_seen[tasks] += 1
        resting = num_seen < self.n_warmup_steps
        growth = torch.where(resting, 0.0, self.robust_step_size * scaled)
        mass = torch.logsumexp(self.log_weights[tasks], dim=0)
        self.log_weights[tasks] = (self.log_weights[tasks] + growth).log_softmax(dim=0) + mass
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
