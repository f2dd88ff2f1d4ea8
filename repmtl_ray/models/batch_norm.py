"""Batch normalisation over the global batch: results do not depend on how many workers share it.

Owns one normalisation layer and the replacement of a model's BatchNorm layers by it. torch's
SyncBatchNorm is not used, because it needs CUDA and has no second derivative. Every worker must run
the same layers in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar, final

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from repmtl_ray.collectives import ALONE, Workers

M = TypeVar("M", bound=nn.Module)


def _reduced_axes(x: Tensor) -> list[int]:
    """All axes of [rows, channels, *positions] but the channels."""
    return [0, *range(2, x.ndim)]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """[channels] in a shape that broadcasts over [rows, channels, *positions]."""
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mean_and_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and sum of squared deviations: [rows, channels, *positions], at least float32
    and not empty -> twice [channels]; no derivative."""
    axes = _reduced_axes(x)
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x, axes, correction=0)
        return mean, variance * (x.numel() // x.shape[1])
    mean = x.mean(axes)  # on a CPU, `torch.var_mean` takes five times as long as these two passes
    return mean, (x - _per_channel(mean, x)).square_().sum(axes)


class _Moments(Function):
    """Each channel's mean and sum of squared deviations: [rows, channels, *positions] -> twice
    [channels].

    Plain tensor operations would do the same, but autograd would then keep several copies of the
    activations. This function keeps its input alone. Its backward consists of differentiable
    operations, so a second derivative exists.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        if count == 0:  # a worker without rows still takes part in the gather
            zeros = _at_least_float32(x).new_zeros(2, x.shape[1])
            mean, squared_deviations = zeros[0].clone(), zeros[1].clone()
        else:
            mean, squared_deviations = _mean_and_squares(_at_least_float32(x))
        ctx.save_for_backward(x, mean)
        return mean, squared_deviations

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        for_mean, for_squares = (_per_channel(cotangent, x) for cotangent in cotangents)
        count = max(x.numel() // x.shape[1], 1)
        # d mean / d x = 1 / count, and d sum (x - mean)^2 / d x = 2 (x - mean): the mean's own
        # share of the latter vanishes, because the deviations add up to zero.
        deviation = _at_least_float32(x) - _per_channel(mean, x)
        if not torch.is_grad_enabled():  # no second derivative is asked for: the same in place
            return deviation.mul_(2 * for_squares).add_(for_mean / count).to(x.dtype)
        return torch.addcmul(for_mean / count, deviation, 2 * for_squares).to(x.dtype)


class _Normalise(Function):
    """(x - mean) * scale + bias, by channel.

    Keeps only x, in its own dtype, and vectors for the backward pass, as the fused kernel does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        deviation = _at_least_float32(x) - _per_channel(mean, x)
        return deviation.mul_(_per_channel(scale, x)).add_(_per_channel(bias, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        x, mean, scale = ctx.saved_tensors
        if _has_fused_backward(x, cotangents[0], scale):
            for_x, for_scale, for_bias = _fused_backward(x, cotangents[0], mean, scale)
            return for_x, -for_bias * scale, for_scale, for_bias
        cotangent = _at_least_float32(cotangents[0])
        axes = _reduced_axes(x)
        for_bias = cotangent.sum(axes)
        for_scale = (cotangent * (_at_least_float32(x) - _per_channel(mean, x))).sum(axes)
        for_x = (cotangent * _per_channel(scale, x)).to(x.dtype)
        return for_x, -for_bias * scale, for_scale, for_bias


def _has_fused_backward(x: Tensor, cotangent: Tensor, scale: Tensor) -> bool:
    """Whether torch's own kernel computes `_Normalise`'s derivative: on a CPU, where it takes half the
    time of five plain operations, and where no second derivative is asked for."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == cotangent.dtype == scale.dtype
        and x.numel() > 0
    )


def _fused_backward(
    x: Tensor, cotangent: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of (x - mean) * scale + bias with respect to x, scale and bias.

    This is torch's batch norm in eval mode, whose weight is `scale` and whose variance is one.
    """
    variance, eps = torch.ones_like(mean), 0.0
    for_x, for_scale, for_bias = torch.ops.aten.native_batch_norm_backward(
        cotangent, x, scale, mean, variance, None, None, False, eps, [True, True, True]
    )
    return for_x, for_scale, for_bias


@final
class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm layer whose statistics are of all workers' rows.

    It takes over the parameters and names of the layer that it replaces. In eval mode, and with one
    worker, it is `F.batch_norm`. A single value per channel (one row of a pooled branch on one
    worker) is normalised by the running statistics and does not change them; torch raises an error
    for it.

    Args:
        replaced: BatchNorm1d, 2d or 3d, or timm's BatchNormAct2d, whose activation comes along.
        workers: whose batches are one.
    """

    def __init__(self, replaced: _BatchNorm, workers: Workers) -> None:
        super().__init__(
            replaced.num_features,
            eps=replaced.eps,
            momentum=replaced.momentum,
            affine=replaced.affine,
            track_running_stats=replaced.track_running_stats,
        )
        for name in ("weight", "bias"):
            setattr(self, name, getattr(replaced, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self._buffers[name] = getattr(replaced, name)
        self.drop: nn.Module = getattr(replaced, "drop", nn.Identity())
        self.act: nn.Module = getattr(replaced, "act", nn.Identity())
        self.workers = workers
        self.training = replaced.training

    def forward(self, input: Tensor) -> Tensor:
        """Normalises, and in training updates the running statistics.

        Args:
            input: [rows, channels, *positions]; rows may differ between workers.

        Returns:
            The same shape and dtype; differentiable twice.
        """
        if not self.training and self.running_mean is not None:
            output = self._with_running_statistics(input)
        elif self.workers.size == 1:
            output = self._with_own_statistics(input)
        else:
            output = self._with_global_statistics(input)
        return self.act(self.drop(output))

    def _with_running_statistics(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _with_own_statistics(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[1] and self.running_mean is not None:
            return self._with_running_statistics(x)
        updating = self.training and self.track_running_stats
        momentum = self._count_batch() if updating else 0.0
        mean, var = self.running_mean, self.running_var
        if not updating and mean is not None and var is not None:
            # Copies take the update. Without any, the graph would hold fewer tensors than the one
            # whose activations are computed again.
            mean, var = mean.clone(), var.clone()
        return functional.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)

    def _with_global_statistics(self, x: Tensor) -> Tensor:
        mean, variance, count = _global_moments(x, self.workers)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._update(mean, variance, count)
        # The moments are equal on every worker, and each worker uses them for its own rows. Their
        # derivative is therefore the sum over workers, which `spread` makes in the backward pass.
        mean, variance = self.workers.spread(torch.stack([mean, variance]))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        bias = torch.zeros_like(scale) if self.bias is None else self.bias
        return _Normalise.apply(x, mean, scale, bias)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        unbiased_variance = variance * (count / (count - 1).clamp_min(1))
        momentum = self._count_batch()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)

    def _count_batch(self) -> float:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2


def _global_moments(x: Tensor, workers: Workers) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel over all workers, in one message.

    Each worker sends its own mean, squared deviations and count. They are combined as Chan, Golub
    and LeVeque do. Sums of x and x^2 would be simpler, but where the mean is much larger than the
    deviation, their difference has no correct digits left.
    """
    own_mean, own_squares = _Moments.apply(x)
    own_count = own_mean.new_full((1,), x.numel() // x.shape[1])
    gathered = workers.gather(torch.cat([own_mean, own_squares, own_count]).unsqueeze(0))
    num_channels = x.shape[1]
    means, squares, counts = gathered.split([num_channels, num_channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(dim=0) / count
    between_workers = (counts * (means - mean).square()).sum(dim=0)
    variance = (squares.sum(dim=0) + between_workers) / count
    return mean, variance, count


_REPLACED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d, GlobalBatchNorm)


def use_global_statistics(module: M, workers: Workers = ALONE) -> M:
    """Replaces every BatchNorm layer by one with the statistics of all workers' batches.

    Parameters stay the same objects, so an optimiser may already hold them. With `ALONE` every
    worker uses the statistics of its own batch, as DistributedDataParallel does.

    Args:
        module: is changed in place. It may itself be a BatchNorm layer: use what is returned.
        workers: whose batches are one.

    Returns:
        The module, or its replacement.

    Raises:
        ValueError: a BatchNorm subclass of unknown behaviour, with more than one worker.
    """
    # By module, what takes its place: a layer that is used twice is replaced by one layer.
    replacements: dict[nn.Module, nn.Module] = {}

    def convert(old: nn.Module, name: str) -> nn.Module:
        if old not in replacements:
            replacements[old] = old
            if type(old) in _REPLACED:
                assert isinstance(old, _BatchNorm)
                replacements[old] = GlobalBatchNorm(old, workers)
            elif isinstance(old, _BatchNorm) and workers.size > 1:
                raise ValueError(
                    f"{name or 'module'} is a {type(old).__name__}, whose statistics cannot be "
                    "made global; choose another encoder or batch_norm 'local'."
                )
            for child_name, child in replacements[old].named_children():
                setattr(
                    replacements[old],
                    child_name,
                    convert(child, f"{name}.{child_name}".lstrip(".")),
                )
        return replacements[old]

    return convert(module, "")  # type: ignore[return-value]


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave all running statistics as they are.

    Args:
        model: in training mode, it still normalises by the statistics of its batch; in eval mode
            nothing changes.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    before = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracks in zip(layers, before, strict=True):
            layer.track_running_stats = tracks
