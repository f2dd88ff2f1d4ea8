"""What Rep-MTL's penalties do to the saliencies, in numbers for every step.

Owns quantities that tell success from its appearance; they change nothing. TSR = H(mean P) - I, so a
low TSR is specialisation (I is high: different positions matter to different tasks) or dominance
(H(mean P) is low: one task matters most everywhere). All are of the global batch. No Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.penalties import affinities


@torch.no_grad()
def diagnose(
    saliency: Tensor,
    tasks: Sequence[str],
    *,
    task_gradient: Tensor,
    penalty_gradient: Tensor | None = None,
    workers: Workers = ALONE,
) -> dict[str, Tensor]:
    """The quantities of one step, by name.

    Args:
        saliency: [tasks, batch, channels, *positions], own rows.
        tasks: names.
        task_gradient: the sum of the tasks' saliencies, own rows, any shape.
        penalty_gradient: of the weighted penalties at the representation, before any `share`; None
            without penalties.
        workers: all whose rows together are the global batch; one message of about 8 T numbers.

    Returns:
        Scalars, float64, replicated; NaN or infinite where the batch has no value:

        - "dominance": H(mean P) in nats, in [0, log T]; mean P is the share of each task, averaged
          over positions (equation 5). log T: no task dominates; 0: one task has everything.
        - "specialisation": I = H(mean P) - TSR in nats, the mutual information of position and task.
        - "gradient_share": |penalty gradient| / |task gradient| at the representation.
        - "alignment/<task>": the mean over samples of the cosine between the task's affinity M_t and
          the anchor's (equations 7 and 8).
        - "effective_rank/<task>": the mean over samples of trace(M_t)^2 / |M_t|^2, which is 1 for a
          matrix of rank one and the rank for one with equal eigenvalues.
        - "channel_mean/<task>": mean |channel mean of S_t| / mean |S_t| over all entries, times
          sqrt(channels). For entries with random signs it is about 1: then equation 4 keeps no more
          of S_t than chance.
    """
    wide = _positions_last(saliency)
    with torch.autocast(saliency.device.type, enabled=False):
        parts = [
            *_sums_of_shares(wide),
            *_sums_by_sample(wide),
            wide.mean(dim=2).abs().sum(dim=(1, 2), dtype=torch.float64),
            wide.abs().sum(dim=(1, 2, 3), dtype=torch.float64) / wide.shape[2],
            _squared_norm(task_gradient),
            _squared_norm(task_gradient if penalty_gradient is None else penalty_gradient),
        ]
    parts = [part.reshape(-1).double() for part in parts]
    totals = torch.cat(parts)
    workers.total_([totals])
    shares, entropy, positions, alignment, rank, samples, mean_sizes, sizes, *squares = (
        totals.split([part.numel() for part in parts])
    )
    dominance = torch.special.entr(shares / positions).sum()
    specialisation = dominance - (entropy / positions).squeeze()
    values = {"dominance": dominance, "specialisation": specialisation}
    if penalty_gradient is not None:
        values["gradient_share"] = (squares[1].sqrt() / squares[0].sqrt()).squeeze()
    by_task = {
        "alignment": alignment / samples,
        "effective_rank": rank / samples,
        "channel_mean": math.sqrt(wide.shape[2]) * mean_sizes / sizes,
    }
    return values | {f"{n}/{t}": v[i] for i, t in enumerate(tasks) for n, v in by_task.items()}


def _positions_last(saliency: Tensor) -> Tensor:
    """[tasks, batch, channels, N] in float32 at least."""
    wide = saliency.float() if saliency.dtype != torch.float64 else saliency
    return wide.flatten(3) if wide.dim() > 3 else wide.unsqueeze(3)


def _sums_of_shares(saliency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over own positions with saliency: the sum of P by task, of its entropy, and their number."""
    magnitude = saliency.mean(dim=2).abs().double()  # [tasks, batch, N]
    total = magnitude.sum(dim=0)
    exists = total > 0
    shares = magnitude / torch.where(exists, total, 1.0)  # zeros where there is no saliency
    entropy = torch.special.entr(shares).sum()
    return shares.sum(dim=(1, 2)), entropy, exists.sum()


def _sums_by_sample(saliency: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[tasks] each, over own samples with saliency: alignments, effective ranks, their number."""
    _, has_anchor, alignment, has_affinity, squared_norm = affinities(saliency)
    peak = saliency.abs().amax(dim=(2, 3), keepdim=True)
    trace = (saliency / torch.where(peak != 0, peak, 1.0)).square().sum(dim=(2, 3))
    valid = has_affinity & has_anchor
    ranks = torch.where(valid, trace.square() / squared_norm, 0.0)
    return torch.where(valid, alignment, 0.0).sum(dim=1), ranks.sum(dim=1), valid.sum(dim=1)


def _squared_norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
