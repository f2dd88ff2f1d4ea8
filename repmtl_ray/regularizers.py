"""`RepMTL`: both penalties of Rep-MTL, weighted and where asked for bounded, for any training loop.

Owns the module that a loop calls, its settings and its checks. The penalties themselves are in
`penalties.py`. No Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd import Function

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import RegularizerConfig
from repmtl_ray.conversion import NonFiniteLossError, shown
from repmtl_ray.penalties import check_number, csa_loss, scale_for_share, tsr_loss
from repmtl_ray.saliency import (
    Losses,
    channels_first,
    check_representation,
    derivative_error,
    named_losses,
    named_saliency,
)

MAX_AXES = 5
"""Of a representation: batch, channels and up to three position axes."""
THROUGH = ("all", "encoder")


def _check_axis(axis: Any) -> int | None:
    if axis is not None and (type(axis) is not int or axis == 0 or not -MAX_AXES < axis < MAX_AXES):
        raise ValueError(
            f"channel_axis is {shown(axis)}; expected 1 for [batch, channels, ...], -1 for [batch, ..., channels], or "
            "another axis of the representation but 0, which is the batch."
        )
    return axis


def _weighted_sum(saliency: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """[*representation]: the sum over tasks of [T, *representation], each times its weight."""
    if weights is None:
        return saliency.sum(dim=0)
    factors = torch.as_tensor(weights, dtype=saliency.dtype, device=saliency.device)
    if factors.shape != saliency.shape[:1]:
        raise ValueError(
            f"weights have shape {tuple(factors.shape)}; expected one number for each of the {saliency.shape[0]} losses."
        )
    return torch.tensordot(factors, saliency, dims=1)


class _AtRepresentation(Function):
    """A number whose derivative at the representation is given, and zero everywhere else."""

    @staticmethod
    def forward(ctx: Any, representation: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return cotangents[0] * gradient, None, None


@final
class RepMTL(nn.Module):
    """Both penalties, weighted, for anybody's training loop; needs neither Ray nor this project's
    trainer.

    >>> regularizer = RepMTL(lambda_tsr=0.9, lambda_csa=0.9, temperature=0.5)
    >>> representation = encoder(images)
    >>> losses = [criterion(head(representation), target) for criterion, head, target in tasks]
    >>> (sum(losses) + regularizer(losses, representation)).backward()

    With `share`, the strength of the penalty is bounded. G is its derivative at the representation
    and g that of the losses' sum; the encoder then gets g + share (|g| / |G|) G, norms over the
    global batch, and the two lambdas only weigh TSR against CSA. With `through="encoder"` the heads
    follow their own losses alone. The loop stays as it is:

    >>> regularizer = RepMTL(share=0.1, through="encoder")
    >>> (sum(losses) + regularizer(losses, representation)).backward()

    It has no parameters. Its settings may be changed between steps and are checked then too.

    Args:
        lambda_tsr, lambda_csa: weights of the two penalties, at least 0; 0 leaves one out, without
            its cost or its demands.
        temperature: of CSA, above 0.
        channel_axis: of the representation; 1 for [B, C, ...], -1 for tokens [B, N, C] and maps
            [B, H, W, C]. None is 1, and is refused for a representation with three axes, which
            may be either.
        workers: for data-parallel loops whose losses are means over the global batch (see the
            guide); by default one worker.
        share: of the losses' gradient at the representation, in norm, that the penalty's gradient
            there has; above 0 and at most 1. None is the paper: the lambdas alone decide.
        through: "all" is the paper: encoder and heads get the penalty's gradient, with `share` both
            times the one factor share |g| / |G|. "encoder": what comes after the representation
            gets none of it.

    Raises:
        ValueError: a setting outside its range; a share of penalties that are both off.

    Source:
        Rep-MTL, arXiv:2507.21049, equation 10. `share` and `through` are not in the paper; why they
        are here is in docs/methods.md.
    """

    lambda_tsr: float
    lambda_csa: float
    temperature: float
    channel_axis: int | None
    workers: Workers
    share: float | None
    through: str

    def __init__(
        self,
        lambda_tsr: float = 0.9,
        lambda_csa: float = 0.9,
        temperature: float = 0.5,
        channel_axis: int | None = None,
        workers: Workers = ALONE,
        share: float | None = None,
        through: Literal["all", "encoder"] = "all",
    ) -> None:
        super().__init__()
        self.lambda_tsr = lambda_tsr
        self.lambda_csa = lambda_csa
        self.temperature = temperature
        self.channel_axis = channel_axis
        self.workers = workers
        self.share = share
        self.through = through
        self._check_share()
        self._is_first_call = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("lambda_tsr", "lambda_csa", "temperature"):
            value = check_number(name, value, positive=name == "temperature")
        elif name == "channel_axis":
            value = _check_axis(value)
        elif name == "share" and value is not None:
            value = check_number(name, value, positive=True)
            if value > 1:
                raise ValueError(f"share is {value}; expected a number above 0 and at most 1.")
        elif name == "through" and value not in THROUGH:
            raise ValueError(f"through is {shown(value)}; expected 'all' or 'encoder'.")
        elif name == "workers" and not isinstance(value, Workers):
            raise ValueError(
                f"workers is {value!r}; expected repmtl_ray.collectives.current(), or nothing for one process."
            )
        super().__setattr__(name, value)

    def forward(
        self,
        losses: Losses,
        representation: Tensor,
        weights: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """The penalty of equation 10, lambda_tsr * TSR + lambda_csa * CSA, times the factor of
        `share` if there is one.

        The first call also makes a second derivative, so that an operation without one is named
        here, and compares the losses of all workers. The losses are read on the host, which waits
        for the device.

        Args:
            losses: T scalars, in a list or by task; log L_t as in the paper, or L_t. T >= 2.
            representation: [B, C, *positions] (or as `channel_axis` says), part of the losses'
                graph.
            weights: [T], read with `share` alone: what your objective multiplies each loss with, so
                that g is the gradient of that objective; None means 1 for every task.

        Returns:
            Scalar, differentiable; float32 at least. The factor of `share` counts as a constant.

        Raises:
            NonFiniteLossError: a loss that is infinite or not a number.
            ValueError: see `task_saliency`; an unclear channel axis; losses that are not means over
                the global batch.
        """
        if not isinstance(representation, Tensor):
            check_representation(representation)
        dtype = torch.promote_types(representation.dtype, torch.float32)
        total = representation.new_zeros((), dtype=dtype)
        self._check_share()
        if not self.lambda_tsr and not self.lambda_csa:
            return total
        check_representation(representation)
        axis = self._axis_of(representation)
        by_name = named_losses(losses)
        self._check_losses(by_name)
        saliency = named_saliency(by_name, representation)
        penalty = sum(self.terms(channels_first(saliency, axis)).values(), total)
        if self.share is not None or self.through == "encoder":
            penalty = self._bounded(penalty, saliency, representation, weights)
        elif self._is_first_call and penalty.requires_grad:
            try:
                torch.autograd.grad(penalty, representation, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise derivative_error(error) from error
        self._is_first_call = False
        return penalty

    def terms(self, saliency: Tensor) -> dict[str, Tensor]:
        """The weighted penalties by name ("tsr", "csa"), those that are on.

        Args:
            saliency: [tasks, batch, channels, *positions].
        """
        terms = {}
        if self.lambda_tsr:
            terms["tsr"] = self.lambda_tsr * tsr_loss(saliency, workers=self.workers)
        if self.lambda_csa:
            terms["csa"] = self.lambda_csa * csa_loss(
                saliency, temperature=self.temperature, workers=self.workers
            )
        return terms

    def extra_repr(self) -> str:
        names = ("lambda_tsr", "lambda_csa", "temperature", "channel_axis")
        shown_names = [*names, *(["share"] if self.share is not None else [])]
        ending = [] if self.through == "all" else [f"through={self.through!r}"]
        return ", ".join([*(f"{name}={getattr(self, name)}" for name in shown_names), *ending])

    def _bounded(
        self,
        penalty: Tensor,
        saliency: Tensor,
        representation: Tensor,
        weights: Sequence[float] | Tensor | None,
    ) -> Tensor:
        """The penalty with the gradients that `share` and `through` say."""
        gradient: Tensor | None = None
        if penalty.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(
                    penalty, representation, retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                raise derivative_error(error) from error
        if gradient is None:
            gradient = torch.zeros_like(representation)
        scale = penalty.new_ones(())
        if self.share is not None:
            of_tasks = _weighted_sum(saliency.detach(), weights)
            scale = scale_for_share(self.share, [of_tasks], [gradient], workers=self.workers)
            scale = scale.to(penalty.dtype)
        if self.through == "all":
            return scale * penalty
        value = (scale * penalty).detach()
        return _AtRepresentation.apply(representation, scale * gradient, value)

    def _check_share(self) -> None:
        if self.share is not None and not self.lambda_tsr and not self.lambda_csa:
            raise ValueError(
                f"share is {self.share} with lambda_tsr 0 and lambda_csa 0: there is no penalty to bound. Set one of them "
                "above 0, or share to None."
            )

    def _axis_of(self, representation: Tensor) -> int:
        """The channel axis of this representation."""
        shape, axis = tuple(representation.shape), self.channel_axis
        if axis is None:
            if len(shape) == 3:
                raise ValueError(
                    f"representation has shape {shape}, which is [batch, channels, positions] with channel_axis=1 and tokens "
                    "[batch, positions, channels] with channel_axis=-1; write `RepMTL(..., channel_axis=-1)` or "
                    "`RepMTL(..., channel_axis=1)`."
                )
            axis = 1
        if not 2 <= len(shape) <= MAX_AXES or not -len(shape) < axis < len(shape):
            raise ValueError(
                f"representation has shape {shape}; expected a batch axis, a channel axis (channel_axis is {axis}) and "
                f"at most {MAX_AXES - 2} position axes."
            )
        return axis

    def _check_losses(self, losses: dict[str, Tensor]) -> None:
        values = torch.stack([loss.detach().reshape(()).double() for loss in losses.values()])
        by_worker = values[None]
        if self._is_first_call:
            by_worker = self.workers.gather(by_worker)
        for name, of_workers in zip(losses, by_worker.T.tolist(), strict=True):
            wrong = [value for value in of_workers if not math.isfinite(value)]
            if wrong:
                raise NonFiniteLossError(
                    f"{name} is {wrong[0]}; expected a finite number. Lower the learning rate, or look at this task's "
                    "labels and predictions (the logarithm of a loss needs a loss above 0)."
                )
            if not all(math.isclose(value, of_workers[0], rel_tol=1e-4) for value in of_workers):
                raise ValueError(
                    f"{name} differs between workers ({', '.join(f'{value:.6g}' for value in of_workers)}); with `workers`, each "
                    "loss is the mean over the global batch: write `loss = workers.total(loss_sum) / workers.total(count)`."
                )


def regularizer_of(config: RegularizerConfig, workers: Workers = ALONE) -> RepMTL:
    """The penalties of an experiment."""
    return RepMTL(
        config.lambda_tsr,
        config.lambda_csa,
        config.temperature,
        workers=workers,
        share=config.share,
        through=config.through,
    )
