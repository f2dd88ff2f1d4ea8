"""UPGrad: unconflicting projection of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


@dataclass(kw_only=True, eq=False)
class UPGrad(GramianPolicy):
    """Every gradient projected so that it harms no task, then the mean.

    Opposed gradients cancel, up to `reg_eps`; zero and dependent ones are fine. A step whose solver
    fails takes equal weights.

    Args:
        reg_eps: added to the diagonal of the Gramian, relative to its trace, so that the problem can
            be solved.

    Source:
        Quinton and Rey, "Jacobian descent for multi-objective optimization", arXiv:2406.16232.
        Solved by quadprog. State: the count of failures.
    """

    reg_eps: Positive = 1e-4

    name = "UPGrad"
    libraries = ("qpsolvers", "quadprog")
    solver = "quadprog"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        from torchjd.aggregation import UPGradWeighting
        from torchjd.linalg import QuadprogProjector

        return UPGradWeighting(projector=QuadprogProjector(reg_eps=self.reg_eps))(gramian)
