"""Gradient policies that look at every coordinate: GradDrop, TrimmedMean, ExcessMTL.

Their result is no function of inner products, so they keep the [T, P] Jacobian of the shared
parameters and cost one encoder backward a task. None allows `gradients="representation"`: GradDrop
there needs the signs of the representation and totals over samples; a trimmed mean of
representation gradients would compare coordinates of single samples; ExcessMTL estimates the
curvature at parameters. Heads have weight 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from repmtl_ray.policies.base import GradientPolicy, TaskPass
from repmtl_ray.policies.gramian import refuse_non_finite
from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.memory import read_back, written

if TYPE_CHECKING:
    from torchjd import aggregation
else:
    aggregation = LazyModule("torchjd.aggregation")


class JacobianPolicy(GradientPolicy):
    """The combined gradient is found by coordinates, from the present tasks' gradients."""

    name: ClassVar[str]

    @final
    def backward(self, task_pass: TaskPass) -> None:
        jacobian = task_pass.jacobian()
        finite = jacobian.isfinite().all(dim=1).cpu()
        refuse_non_finite(self.name, self.tasks, self.step + 1, finite)
        tasks = task_pass.present.cpu().nonzero().flatten()
        everyone = len(tasks) == len(self.tasks)
        if len(tasks):
            direction = self._direction(jacobian if everyone else jacobian[tasks], tasks)
        else:
            direction = torch.zeros_like(jacobian[0])
        heads = torch.ones(len(self.tasks), dtype=jacobian.dtype, device=jacobian.device)
        task_pass.finish_with_direction(direction, heads)
        self.step += 1

    @abstractmethod
    def _direction(self, jacobian: Tensor, tasks: Tensor) -> Tensor:
        """[N] combined gradient.

        Args:
            jacobian: [P, N] gradients of the tasks that are present.
            tasks: [P], their indices, on the CPU.
        """


class GradDrop(JacobianPolicy):
    """At each coordinate one sign is drawn, by its share of the absolute sum; the other is dropped.

    Zero coordinates stay zero; any gradients are fine.

    Args:
        tasks, seed: as for every policy.
        leak: by task, the share of a dropped gradient that passes all the same.

    Source:
        Chen et al., "Just pick a sign", NeurIPS 2020, algorithm 1, lines 10 to 15, on the gradients
        of shared parameters. The paper's layer works on activations; LibMTL allows that alone.
        State: none but the step.
    """

    name = "GradDrop"

    def __init__(self, tasks: Sequence[str], *, seed: int, leak: Sequence[float]) -> None:
        super().__init__(tasks, seed=seed)
        self.leak = torch.tensor(leak, dtype=torch.float64)

    def _direction(self, jacobian: Tensor, tasks: Tensor) -> Tensor:
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

    def _direction(self, jacobian: Tensor, tasks: Tensor) -> Tensor:
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

    def _direction(self, jacobian: Tensor, tasks: Tensor) -> Tensor:
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
        weights = self.log_weights.softmax(dim=0).tolist()
        return {f"weight/{task}": weight for task, weight in zip(self.tasks, weights, strict=True)}

    def _state(self) -> dict[str, Any]:
        return written(self, self.remembered)

    def _load_state(self, state: dict[str, Any]) -> None:
        read_back(self, self.remembered, state, self.name)
