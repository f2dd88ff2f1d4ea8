"""Rep-MTL's equations 4 to 9 as printed, matrices and all: the slow reference of the regulariser
tests and `bench.csa`."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def literal_tsr(saliency: Tensor) -> Tensor:
    """Equations 4 to 6, for saliencies without zeros; [tasks, batch, channels, *positions]."""
    channel_mean = saliency.mean(dim=2)
    share = channel_mean.abs() / channel_mean.abs().sum(dim=0, keepdim=True)
    return -(share * share.log()).sum(dim=0).mean()


def literal_csa(saliency: Tensor, temperature: float) -> Tensor:
    """Equations 7 to 9, for saliencies without zeros, every C x C matrix built; [tasks, batch,
    channels, *positions]."""
    flat = saliency.flatten(3) if saliency.dim() > 3 else saliency.unsqueeze(3)
    affinity = flat @ flat.transpose(2, 3)
    columns = flat.mean(dim=3).permute(1, 2, 0)
    anchor = columns @ columns.transpose(1, 2)
    z_task = normalize(affinity.flatten(2), dim=2, eps=0)
    z_anchor = normalize(anchor.flatten(1), dim=1, eps=0)
    positive = (z_task * z_anchor).sum(dim=2)
    to_others = (z_anchor @ z_anchor.T) / temperature
    others = to_others.masked_fill(
        torch.eye(len(to_others), dtype=torch.bool, device=flat.device), -torch.inf
    )
    return -((positive / temperature).exp() / others.exp().sum(dim=1)).log().mean()
