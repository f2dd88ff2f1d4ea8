"""ConFIG: conflict-free inverse gradients. (The configuration of a policy is in
`repmtl_ray.config`.)"""

from __future__ import annotations

import torch
from torch import Tensor

from repmtl_ray.policies.base import StepInputs
from repmtl_ray.policies.gramian import GramianPolicy


class ConFIG(GramianPolicy):
    """The direction with equal cosines to all gradients, as long as all their projections on it.

    Zero gradients are left out; dependent ones go through a pseudo-inverse; opposed ones give zero.

    Source:
        Liu et al., "ConFIG", arXiv:2408.11104, equation 2. TorchJD's works on the Jacobian by a
        singular value decomposition of [T, P]; here the same weights come from the [T, T] cosines.
        State: none.
    """

    name = "ConFIG"

    def gramian_weights(self, gramian: Tensor, inputs: StepInputs) -> Tensor:
        norms = gramian.diagonal().sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        cosines = gramian * torch.outer(inverse, inverse)
        target = (norms > 0).double()
        weights = inverse * (torch.linalg.pinv(cosines, rtol=1e-12, hermitian=True) @ target)
        square = weights @ gramian @ weights
        length = (gramian @ weights).sum()
        return torch.where(square > 1e-24, weights * length / square, 0.0)
