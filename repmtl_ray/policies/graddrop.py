"""GradDrop: gradient sign dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Number, NumberPerTask, PerTask
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.jacobian import JacobianPolicy
from repmtl_ray.policies.task_pass import TaskPass


@dataclass(kw_only=True, eq=False)
class GradDrop(JacobianPolicy):
    """At each coordinate one sign is drawn, by its share of the absolute sum; the other is dropped.

    Zero coordinates stay zero; any gradients are fine.

    Args:
        leak: per task, the share of a dropped gradient that passes all the same.
        at_representation: draw for the units of the representation, the paper's layer, at the cost
            of one encoder backward in all.

    Source:
        Chen et al., "Just pick a sign", NeurIPS 2020, algorithm 1. At the representation (LibMTL
        allows that alone) all of it: gradients times the signs of their units, totalled over the
        samples of the global batch, decide; a unit's sign is then dropped or kept in every sample.
        At the shared parameters, the default here as for every gradient policy, lines 10 to 15 on
        their gradients, which have no samples. State: none but the step.
    """

    leak: Annotated[PerTask, NumberPerTask(Number(at_most=1))] = 0.0
    at_representation: bool = False

    name = "GradDrop"
    allows_representation = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_representation and (self.normalize, self.combined, self.max_norm) != (
            "none",
            "one",
            0.0,
        ):
            raise ValueError(
                f"policy {self.name!r}: policy.arguments.normalize, combined and max_norm are for "
                "gradients at the parameters, but policy.gradients is 'representation'. Leave them "
                "out, or set gradients to 'parameters'."
            )

    def backward(self, task_pass: TaskPass) -> None:
        if not self.at_representation:
            super().backward(task_pass)
            return
        inputs = self._inputs_of(task_pass)
        signs = task_pass.representation.sign()
        totals = torch.stack([(part * signs).sum(dim=0) for part in task_pass.saliency])
        task_pass.workers.total_([totals])
        is_finite = totals.isfinite().flatten(1).all(dim=1).cpu()
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        size = totals.abs().sum(dim=0)
        share = 0.5 * (1 + totals.sum(dim=0) / torch.where(size > 0, size, 1.0))
        with self._drawing(totals.device):
            draw = torch.rand(share.shape, dtype=share.dtype, device=share.device)
        passes = ((share > draw) & (totals > 0)) | ((share < draw) & (totals < 0))
        leaks = torch.tensor(self.leak, dtype=torch.float64)
        combined = torch.zeros_like(signs)
        for saliency, leak, is_kept in zip(task_pass.saliency, leaks, passes, strict=True):
            combined += saliency * (leak + (1 - leak) * is_kept).to(saliency)
        self.last_head_weights = self._weights_of_heads(inputs)
        task_pass.finish_at_representation(combined, self.last_head_weights)
        self.step += 1

    def direction(self, jacobian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd import aggregation

        leaks = torch.tensor(self.leak, dtype=torch.float64)[inputs.tasks]
        aggregator = aggregation.GradDrop(leak=leaks.to(jacobian))
        with self._drawing(jacobian.device):
            return aggregator(jacobian)
