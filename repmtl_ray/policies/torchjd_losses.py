"""Policies that weigh losses by their values: TorchJD's scalarizers, and what they remember.

What holds for all (absent tasks, refused losses, weights by differentiation) is in `scalarized.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repmtl_ray.policies.lazy import LazyModule
from repmtl_ray.policies.refusals import SMALLEST_LOSS
from repmtl_ray.policies.scalarized import CPU, ScalarizedLosses, gradient_of
from repmtl_ray.policies.task_adam import TaskAdam

if TYPE_CHECKING:
    from torchjd import scalarization
    from torchjd.scalarization import Scalarizer
else:
    scalarization = LazyModule("torchjd.scalarization")


class RLW(ScalarizedLosses):
    """Random weights, drawn anew each step: the softmax of T normal numbers.

    All T numbers are drawn whoever is present; an absent task's share is not handed out.

    Args:
        tasks, seed: as for every policy.
        sum_to: "one", as in the paper, or "tasks": T times that, the scale of EW.

    Source:
        Lin et al., "Reasonable effectiveness of random weighting", arXiv:2111.10603, algorithm 2.
        Weights sum to 1, EW's to T: with a penalty or without Adam the two need different learning
        rates. State: none but the step.
    """

    name = "RLW"

    def __init__(self, tasks: Sequence[str], *, seed: int, sum_to: str) -> None:
        super().__init__(tasks, seed=seed)
        self.total = {"one": 1.0, "tasks": float(len(tasks))}[sum_to]

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        everyone = torch.zeros(len(self.tasks), dtype=torch.float64)
        with self._drawing(CPU):
            (weights,) = gradient_of(scalarization.Random(), everyone)
        return self.total * weights[tasks]


class GLS(ScalarizedLosses):
    """The geometric mean of the present tasks' losses, as the exponential of their mean logarithm.

    Needs positive losses: it takes their logarithm. With log losses the update is that of L itself.

    Source:
        Chennupati et al., "MultiNet++", CVPRW 2019, equation 6. State: none.
    """

    name = "GLS"
    needs_positive_losses = True

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        return gradient_of(scalarization.GeometricMean(), losses)[0]


class UW(ScalarizedLosses):
    """Uncertainty weighting: sum_t L_t / (2 e^s_t) + s_t / 2, with s learnt by an Adam of its own.

    Needs positive losses: for a negative one the sum falls without bound as s falls. An absent
    task's s does not move.

    Args:
        tasks, seed: as for every policy.
        learning_rate: of s.

    Source:
        Kendall et al., CVPR 2018, with s = log sigma^2 from 0; s has the learning rate of
        nash-mtl's code (0.025) and no weight decay. LibMTL learns s with the model's optimiser,
        from -0.5, and sums L_t / e^s_t + s_t / 2. State: s and its Adam.
    """

    name = "UW"
    needs_positive_losses = True

    def __init__(self, tasks: Sequence[str], *, seed: int, learning_rate: float) -> None:
        super().__init__(tasks, seed=seed)
        self.scales = TaskAdam(len(tasks), learning_rate=learning_rate)

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        scalarizer, scale = self._scalarizer(self.scales.values[tasks])
        weights, gradient = gradient_of(scalarizer, losses, scale)
        self.scales.step(gradient, tasks)
        return weights

    def _scalarizer(self, values: Tensor) -> tuple[Scalarizer, Tensor]:
        """The formula, and its parameter set to `values`."""
        scalarizer = scalarization.UW(len(values))
        scalarizer.log_var.data = values
        return scalarizer, scalarizer.log_var

    def _state(self) -> dict[str, Any]:
        return self.scales.state()

    def _load_state(self, state: dict[str, Any]) -> None:
        self.scales.load_state(state, self.name)


class IMTLL(UW):
    """IMTL-L: sum_t e^s_t L_t - s_t, with s learnt by an Adam of its own; e^s_t L_t tends to 1.

    Needs positive losses, as UW does. An absent task's s does not move.

    Args:
        tasks, seed, learning_rate: as for UW.

    Source:
        Liu et al., "Towards impartial multi-task learning", ICLR 2021, equation 8. LibMTL learns s
        with the model's optimiser; here it has UW's rate. State: s and its Adam.
    """

    name = "IMTL-L"

    def _scalarizer(self, values: Tensor) -> tuple[Scalarizer, Tensor]:
        scalarizer = scalarization.IMTLL(len(values))
        scalarizer.log_scale.data = values
        return scalarizer, scalarizer.log_scale


class DWA(ScalarizedLosses):
    """Dynamic weight average: P softmax(r / temperature), r = mean loss by that an epoch earlier.

    Weights are 1 in the first two epochs. Needs positive losses: a ratio of means near zero, or of
    either sign, says nothing about speed. A task's means are over the batches that held labels of
    it; without two means its r is 1.

    Args:
        tasks, seed: as for every policy.
        temperature: larger is more uniform.

    Source:
        Liu et al., "End-to-end multi-task learning with attention", CVPR 2019, equation 7. State:
        two epochs of means and the sums of the present one.
    """

    name = "DWA"
    needs_positive_losses = True
    remembered = ("loss_sums", "num_batches", "last_means", "earlier_means")

    def __init__(self, tasks: Sequence[str], *, seed: int, temperature: float) -> None:
        super().__init__(tasks, seed=seed)
        self.temperature = temperature
        unknown = torch.full((len(tasks),), torch.nan, dtype=torch.float64)
        self.last_means, self.earlier_means = unknown, unknown.clone()
        self.loss_sums, self.num_batches = torch.zeros_like(unknown), torch.zeros_like(unknown)

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        self.loss_sums[tasks] += losses
        self.num_batches[tasks] += 1
        known = ~self.earlier_means[tasks].isnan()
        scalarizer = scalarization.DWA(self.temperature)
        scalarizer._previous_averages = [
            torch.where(known, means[tasks], 1.0) for means in (self.earlier_means, self.last_means)
        ]
        return gradient_of(scalarizer, losses)[0]

    def end_epoch(self) -> None:
        seen = self.num_batches > 0
        means = self.loss_sums / self.num_batches
        self.earlier_means = torch.where(seen, self.last_means, self.earlier_means)
        self.last_means = torch.where(seen, means, self.last_means)
        self.loss_sums, self.num_batches = torch.zeros_like(means), torch.zeros_like(means)


class FAMO(ScalarizedLosses):
    """FAMO: c sum_t z_t log L_t with z = softmax(w), where w follows how much each loss fell.

    After the model's step the losses of the same batch move w, so that slow tasks gain. Needs
    positive losses: it takes their logarithm. Absent tasks are out of the softmax and their w does
    not move.

    Args:
        tasks, seed: as for every policy.
        learning_rate, weight_decay: of w's own Adam.

    Source:
        Liu et al., "FAMO", NeurIPS 2023, algorithm 2: rate 0.025; decay 1e-3 (NYUv2; 0.01 for
        Cityscapes). The official code's default decay is 1e-5. State: w and its Adam.
    """

    name = "FAMO"
    needs_positive_losses = True
    needs_second_look = True

    def __init__(
        self, tasks: Sequence[str], *, seed: int, learning_rate: float, weight_decay: float
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.logits = TaskAdam(len(tasks), learning_rate=learning_rate, weight_decay=weight_decay)
        self._before: tuple[Tensor, Tensor] | None = None  # losses and tasks, until the second look

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        scalarizer = scalarization.FAMO(len(tasks))
        scalarizer._w.data = self.logits.values[tasks]
        self._before = (losses, tasks)
        return gradient_of(scalarizer, losses)[0]

    def second_look(self, plain_losses: Tensor) -> None:
        if self._before is None:  # no task was present
            return
        before, tasks = self._before
        self._before = None
        after = plain_losses.detach().to("cpu", torch.float64)
        self._check(after, tasks)
        fall = torch.log(before + 1e-8) - torch.log(after[tasks].clamp(min=SMALLEST_LOSS) + 1e-8)
        shares = torch.softmax(self.logits.values[tasks], dim=0)
        self.logits.step(shares * (fall - shares @ fall), tasks)

    def _state(self) -> dict[str, Any]:
        return self.logits.state()

    def _load_state(self, state: dict[str, Any]) -> None:
        self.logits.load_state(state, self.name)


class STCH(ScalarizedLosses):
    """Smooth Tchebycheff: EW on log losses first, then mu logsumexp(log(L / nadir) / mu).

    The nadir is the mean losses of epoch `warmup_epochs` (counted from 0), which still trains as EW
    on log losses; a task that was absent throughout takes the first loss seen later. Needs positive
    losses: it takes their logarithm.

    Args:
        tasks, seed: as for every policy.
        mu: smaller is closer to the maximum.
        warmup_epochs: EW epochs before the one that measures the nadir.
        sum_to: "tasks", T times the formula, as the official code and LibMTL have it and on EW's
        scale; "one", the
            paper's formula.

    Source:
        Lin et al., "Smooth Tchebycheff scalarization", ICML 2024, arXiv:2402.19078; warm-up and
        nadir from the official code (Xi-L/STCH, STCH_MTL): epochs 0 to 3 and epoch 4 for the nadir.
        State: epoch, nadir.
    """

    name = "STCH"
    needs_positive_losses = True
    remembered = ("epoch", "loss_sums", "num_batches")

    def __init__(
        self, tasks: Sequence[str], *, seed: int, mu: float, warmup_epochs: int, sum_to: str
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.mu, self.warmup_epochs, self.sum_to = mu, warmup_epochs, sum_to
        self.epoch = 0
        self.loss_sums = torch.zeros(len(tasks), dtype=torch.float64)
        self.num_batches = torch.zeros_like(self.loss_sums)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        warm = self.epoch > self.warmup_epochs
        measured = self.epoch == self.warmup_epochs or (warm and self.num_batches[tasks] == 0)
        self.loss_sums[tasks] += torch.where(torch.as_tensor(measured), losses, 0.0)
        self.num_batches[tasks] += torch.as_tensor(measured).double()
        if not warm:
            return 1 / losses
        nadir = self.loss_sums[tasks] / self.num_batches[tasks]
        scalarizer = scalarization.STCH(self.mu, weights=torch.ones_like(losses))
        shares = gradient_of(scalarizer, torch.log(losses / nadir))[0]
        return shares / losses * (len(tasks) if self.sum_to == "tasks" else 1)


class PBI(ScalarizedLosses):
    """PBI: the length of the losses along a direction, plus theta times their distance from it.

    Needs positive losses: the direction starts at the ideal point, which is a lower bound of the
    losses. Weights may be negative: a loss that is too small for the direction is raised.

    Args:
        tasks, seed: as for every policy.
        theta: of the distance.
        weights: the direction, by task.
        reference: the ideal point, by task.

    Source:
        Zhang and Li, "MOEA/D", 2007, section III-B-3; theta 5 as there. State: none.
    """

    name = "PBI"
    needs_positive_losses = True

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        seed: int,
        theta: float,
        weights: Sequence[float],
        reference: Sequence[float],
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.theta = theta
        self.direction = torch.tensor(weights, dtype=torch.float64)
        self.reference = torch.tensor(reference, dtype=torch.float64)

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        formula = scalarization.PBI(self.theta, self.direction[tasks], self.reference[tasks])
        return gradient_of(formula, losses)[0]


class COSMOS(ScalarizedLosses):
    """A weighted sum of losses minus lambda times the cosine of losses and weights.

    Needs positive losses: the cosine compares directions within the positive orthant. Only the
    objective: the full method also feeds the preference to the model and draws it anew each step.

    Args:
        tasks, seed: as for every policy.
        lambda_: of the cosine; the paper's lie between 0.01 and 8.
        weights: the preference, by task.

    Source:
        Ruchte and Grabocka, arXiv:2103.13392, equation 4. State: none.
    """

    name = "COSMOS"
    needs_positive_losses = True

    def __init__(
        self, tasks: Sequence[str], *, seed: int, lambda_: float, weights: Sequence[float]
    ) -> None:
        super().__init__(tasks, seed=seed)
        self.lambda_ = lambda_
        self.preference = torch.tensor(weights, dtype=torch.float64)

    def _weights(self, losses: Tensor, tasks: Tensor) -> Tensor:
        return gradient_of(scalarization.COSMOS(self.lambda_, self.preference[tasks]), losses)[0]
