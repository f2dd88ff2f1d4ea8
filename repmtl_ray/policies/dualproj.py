"""DualProj: the mean gradient, projected."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class DualProj(GramianPolicy):
    """The mean gradient, projected so that it harms no task.

    Opposed gradients cancel, up to `reg_eps`; zero and dependent ones are fine. A step whose solver
    fails takes equal weights.

    Args:
        reg_eps: as for UPGrad.

    Source:
        Lopez-Paz and Ranzato, "Gradient episodic memory", NeurIPS 2017, equation 11. Solved by
        quadprog. State: the count of failures.
    """

    reg_eps: Positive = 1e-4

    name = "DualProj"
    libraries = ("qpsolvers", "quadprog")
    solver = "quadprog"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import DualProjWeighting
        from torchjd.linalg import QuadprogProjector

        return DualProjWeighting(projector=QuadprogProjector(reg_eps=self.reg_eps))(gramian)
