"""The factor that keeps gradients in float16 from vanishing, and what happens when it is too large.

Owns the factor of a run, which a checkpoint holds. Where derivatives are taken times the factor and
divided by it again is in `graph_split.py` and `penalty.py`; nobody else sees scaled values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from repmtl_ray.conversion import NonFiniteGradientError
from repmtl_ray.policies.base import Policy

GROWTH_INTERVAL = 2000
SMALLEST = 1.0


@dataclass(kw_only=True)
class LossScale:
    """A power of two, so that multiplying by it and dividing by it again is exact.

    A gradient that is not finite halves it and skips the step; `GROWTH_INTERVAL` steps without one
    double it. Every worker sees the same gradients' flags, so all have the same factor.

    Args:
        scale: of losses, penalties and what enters the encoder's backward pass.
        num_good_steps: since it changed.

    Source:
        Micikevicius et al., arXiv:1710.03740; numbers of torch.amp.GradScaler.
    """

    scale: float = 65536.0
    num_good_steps: int = 0

    def attempt(
        self,
        update: Callable[[], dict[str, float]],
        policy: Policy,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, float]:
        """Runs a step, or skips it: then parameters, optimiser and policy are as before its last
        update.

        Args:
            update: makes the step and gives its metrics.
            policy, optimizer: what it changes.

        Returns:
            The metrics of `update`, none of a step that was skipped; and "loss_scale" of the step.

        Raises:
            NonFiniteGradientError: a gradient that is not finite although nothing is scaled.
        """
        used, before = self.scale, policy.state_dict()
        try:
            metrics = update()
        except NonFiniteGradientError:
            if self.scale <= SMALLEST:
                raise
            optimizer.zero_grad(set_to_none=True)
            policy.load_state_dict(before)
            policy.last_weights = None  # no checkpoint holds them, so a resumed run has none either
            self.scale, self.num_good_steps = self.scale / 2, 0
            return {"loss_scale": used}
        self.num_good_steps += 1
        if self.num_good_steps == GROWTH_INTERVAL:
            self.scale, self.num_good_steps = 2 * self.scale, 0
        return {**metrics, "loss_scale": used}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.num_good_steps = state["scale"], state["num_good_steps"]
