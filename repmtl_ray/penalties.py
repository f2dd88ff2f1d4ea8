"""Rep-MTL's two penalties: TSR (equations 4 to 6) and CSA (equations 7 to 9), exact and small.

Owns pure functions of saliency, and the scale that bounds a penalty's gradient; `regularizers.py`
adds the penalties to a training loop. Both penalties depend on the direction of saliencies and not on
their scale. So every function divides by the largest entry first, and computes with numbers around
1, in float32 at least, whatever the scale and the autocast dtype. Across workers the batch is the
global one (collectives.py). No Ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from repmtl_ray.affinities import affinities
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.conversion import shown


def tsr_loss(saliency: Tensor, *, workers: Workers = ALONE) -> Tensor:
    """Entropy of the task distribution at each position, averaged.

    It is low when every position matters to one task, and log(T) when all tasks weigh the same
    everywhere.

    Args:
        saliency: [tasks, batch, channels, *positions]; loss per feature unit; any scale.
        workers: all whose rows together are the global batch; every worker passes its own rows.

    Returns:
        Scalar in nats, in [0, log(tasks)], float32 at least; differentiable twice; 0 if no position
        carries saliency.

    Raises:
        ValueError: fewer than two tasks, or no channel axis.

    Source:
        Rep-MTL, arXiv:2507.21049, equations 4 to 6. Positions where every task's channel mean is
        zero carry no information and are left out of the mean (the paper does not say). Where a
        single task's mean is exactly zero, |x| has derivative 0, and x log x is 0 with derivative 0.
    """
    _check_saliency(saliency)
    with torch.autocast(saliency.device.type, enabled=False):
        magnitude = _at_least_float32(saliency).mean(dim=2).abs()  # [tasks, batch, *positions]
        peak = magnitude.detach().amax(dim=0)
        has_saliency = peak != 0  # true for NaN, which must show in the result
        magnitude = magnitude / torch.where(has_saliency, peak, 1.0)
        total = torch.where(has_saliency, magnitude.sum(dim=0), 1.0)
        # With p = m / sum(m), the entropy is log(sum(m)) - sum(m log m) / sum(m). In this form no
        # probability is divided by zero. Zeros become ones before the logarithm, so that neither
        # value nor derivatives are NaN: 1 log 1 = 0 stands for 0 log 0 = 0.
        positive = torch.where(magnitude > 0, magnitude, 1.0)
        entropy = total.log() - (positive * positive.log()).sum(dim=0) / total
        return _global_mean(entropy, has_saliency, workers)


def csa_loss(saliency: Tensor, *, temperature: float = 0.5, workers: Workers = ALONE) -> Tensor:
    """Contrast of each task's channel affinity with its sample's anchor against others' anchors.

    It is low when the affinities of all tasks at a sample agree with that sample's anchor, and the
    anchors of different samples differ.

    Args:
        saliency: [tasks, batch, channels, *positions], any number of position axes, none included;
            any scale.
        temperature: of the softmax over samples, above 0. The paper gives none; 0.5 is this
            project's default.
        workers: all whose rows together are the global batch; every worker passes its own rows,
            equally many.

    Returns:
        Scalar in nats, float32 at least; differentiable twice; 0 if no (sample, task) pair can be
        contrasted.

    Raises:
        ValueError: fewer than two tasks, no channel axis, fewer than two samples in the global
            batch, or a temperature that is not above 0.

    Source:
        Rep-MTL, arXiv:2507.21049, equations 7 to 9, without their C x C matrices. With S_t in
        [C, N] and the anchor's columns A in [C, T], all norms and products Frobenius:
        <S_t S_t^T, A A^T> = |S_t^T A|^2; |S_t S_t^T| = |S_t^T S_t|, of which the smaller is built;
        <A_b A_b^T, A_k A_k^T> = |A_b^T A_k|^2. The denominator leaves out the sample itself, as
        printed. Deviation for data with gaps, on which the paper is silent: a pair whose saliency
        is zero, or whose anchor is, is left out of the mean, and so is a zero anchor among the
        negatives.
    """
    _check_saliency(saliency)
    check_number("temperature", temperature, positive=True)
    num_samples = saliency.shape[1] * workers.size
    if num_samples < 2:
        raise ValueError(
            "csa_loss got a global batch of 1 sample; it contrasts samples and needs at least 2: raise the batch size or "
            "set lambda_csa to 0."
        )
    with torch.autocast(saliency.device.type, enabled=False):
        own = _at_least_float32(saliency)
        own = own.flatten(3) if own.dim() > 3 else own.unsqueeze(3)  # [tasks, batch, channels, N]
        anchors, has_anchor, alignment, has_affinity, _ = affinities(own)
        similarity, is_negative = _similarity(anchors, has_anchor, workers)
        # -log(exp(alignment) / sum over negatives of exp(similarity)), both over the temperature.
        # A row without negatives would give logsumexp of -inf only, whose derivative is NaN even
        # where the result is masked: its logits become zeros, and `valid` leaves it out.
        logits = (similarity / temperature).masked_fill(~is_negative, -torch.inf)
        has_negative = is_negative.any(dim=1)
        log_denominator = torch.logsumexp(torch.where(has_negative[:, None], logits, 0.0), dim=1)
        valid = has_affinity & (has_anchor & has_negative)
        return _global_mean(log_denominator - alignment / temperature, valid, workers)


def divergence_loss(saliency: Tensor, *, workers: Workers = ALONE) -> Tensor:
    """log T minus the Jensen-Shannon divergence of the tasks' saliency over positions.

    With e_{i,t} = |S_{i,t}|^2, summed over channels, and p_t = e_t / sum_i e_{i,t}, the divergence is
    H(mean_t p_t) - mean_t H(p_t). It is the mutual information of position and task when every task
    has the same mass, so dominance cannot lower it; it is read from all channels, so weights
    that sum to zero over channels cannot either; and positions weigh what their saliency does. It is
    0 when no position matters to two tasks, and log T when tasks weigh positions alike.

    Args:
        saliency: [tasks, batch, channels, *positions]; any scale, one per task.
        workers: all whose rows together are the global batch; every worker passes its own rows.

    Returns:
        Scalar in nats, in [0, log T], float32 at least; differentiable twice. Tasks without
        saliency are left out of T.

    Raises:
        ValueError: fewer than two tasks, or no channel axis.

    Source:
        This project's, for its study of Rep-MTL (docs/results.md); it is no option of training.
    """
    _check_saliency(saliency)
    with torch.autocast(saliency.device.type, enabled=False):
        own = _at_least_float32(saliency)
        own = own.flatten(3) if own.dim() > 3 else own.unsqueeze(3)  # [tasks, batch, channels, N]
        peaks = workers.gather(own.detach().abs().flatten(1).amax(dim=1)[None]).amax(dim=0)
        exists = peaks != 0  # true for NaN, which must show in the result
        own = own / torch.where(exists, peaks, 1.0)[:, None, None, None]
        energy = own.square().sum(dim=2).flatten(1)  # [tasks, batch x N]
        mass = workers.spread(workers.total(energy.sum(dim=1)))
        shares = energy / torch.where(exists, mass, 1.0)[:, None]
        num_tasks = exists.sum().clamp(min=1)
        mean_entropy = _entropy(shares) / num_tasks
        divergence = workers.total(_entropy(shares.sum(dim=0) / num_tasks) - mean_entropy)
        return num_tasks.to(divergence.dtype).log() - divergence


@torch.no_grad()
def scale_for_share(
    share: float,
    task_gradient: Iterable[Tensor],
    penalty_gradient: Iterable[Tensor],
    *,
    workers: Workers = ALONE,
) -> Tensor:
    """The factor that makes a penalty's gradient a fixed share of the tasks' gradient, in norm.

    Args:
        share: of the tasks' norm, above 0.
        task_gradient, penalty_gradient: tensors at the same place, any shapes; own rows if there
            are several `workers`, whose squares are then added up in one message of two numbers.
        workers: all whose rows together are the global batch.

    Returns:
        Scalar, float64, replicated: share * |task_gradient| / |penalty_gradient|, norms over all
        entries; 0 where the penalty has no gradient.
    """
    squares = torch.stack([_squared_norm(task_gradient), _squared_norm(penalty_gradient)])
    workers.total_([squares])
    of_tasks, of_penalty = squares.sqrt()
    exists = of_penalty != 0  # true for NaN, which must show in the result
    return torch.where(exists, share * of_tasks / torch.where(exists, of_penalty, 1.0), 0.0)


def _squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum()


def _similarity(anchors: Tensor, has_anchor: Tensor, workers: Workers) -> tuple[Tensor, Tensor]:
    """The cosines between this worker's anchors and those of the global batch.

    Args:
        anchors: [batch, tasks, channels], of `affinities`.
        has_anchor: [batch] bool.
        workers: all of them.

    Returns:
        [batch, global batch]; and which of them are negatives: all anchors but the sample's own.
    """
    batch, tasks, channels = anchors.shape
    # Gathered anchors are equal on every worker, and each worker compares its own rows with them:
    # `spread` adds the workers' derivatives up in the backward pass.
    all_anchors = workers.spread(workers.gather(anchors))
    all_have_anchor = workers.gather(has_anchor.to(anchors.dtype)) > 0
    products = anchors.reshape(batch * tasks, channels) @ all_anchors.reshape(-1, channels).T
    similarity = products.reshape(batch, tasks, -1, tasks).square().sum(dim=(1, 3))
    own_index = torch.arange(batch, device=anchors.device) + workers.rank * batch
    is_self = own_index[:, None] == torch.arange(all_anchors.shape[0], device=anchors.device)
    return similarity, all_have_anchor & ~is_self


def _global_mean(values: Tensor, valid: Tensor, workers: Workers) -> Tensor:
    """The mean of the valid values over all workers' rows; 0 if there is none."""
    own_sum = torch.where(valid, values, 0.0).sum()
    count = workers.total(valid.sum().to(values.dtype))
    return workers.total(own_sum) / count.clamp(min=1)


def _entropy(shares: Tensor) -> Tensor:
    """The sum of -x log x; zeros become ones before the logarithm, whose derivative is finite."""
    positive = torch.where(shares > 0, shares, 1.0)
    return -(positive * positive.log()).sum()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    try:
        number = (
            float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        )
    except OverflowError:  # Python's integers have no limit
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        bound = "above 0" if positive else "at least 0"
        raise ValueError(f"{name} is {shown(value)}; expected a finite number {bound}.")
    return number


def _check_saliency(saliency: Tensor) -> None:
    if not isinstance(saliency, Tensor):
        raise ValueError(
            f"saliency is a {type(saliency).__name__}; expected the tensor that task_saliency returns."
        )
    if saliency.dim() < 3:
        raise ValueError(
            f"saliency has shape {tuple(saliency.shape)}; expected [tasks, batch, channels, *positions] as task_saliency "
            "returns it."
        )
    if saliency.shape[0] < 2:
        raise ValueError(
            f"saliency has {saliency.shape[0]} task; Rep-MTL's penalties compare at least 2."
        )
