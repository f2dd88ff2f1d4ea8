"""Whether losses and gradients are finite, and what to say where they are not.

Owns the checks of a step, their messages, and the two times that the host waits for the device in a
step: for the losses with all flags and diagnostics, and for the norm of the update. All of them are
equal on every worker, so that all workers raise.

The norm is read before the optimiser's step, and not one step later: the graph that tells which task's
gradient is not finite still exists then, and no checkpoint can hold such an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repmtl_ray.collectives import Workers
from repmtl_ray.config import NonFiniteLossError
from repmtl_ray.conversion import NonFiniteGradientError
from repmtl_ray.policies.task_pass import Penalty, TaskPass
from repmtl_ray.runs.graph_split import TaskDerivatives

PENALTY = "Rep-MTL's penalty"


def largest_entry(tensors: Iterable[Tensor | None]) -> Tensor:
    """The largest absolute entry of all tensors; NaN if any entry is."""
    present = [tensor for tensor in tensors if tensor is not None and tensor.numel()]
    return nn.utils.get_total_norm(present, math.inf)


def check_losses(
    tasks: Sequence[str], losses: Sequence[float], *, log_losses: bool, where: str
) -> None:
    """Refuses losses that no update can be made from.

    Args:
        tasks: names.
        losses: plain ones, by task.
        log_losses: whether their logarithms are trained on.
        where: step and policy, for the message.

    Raises:
        NonFiniteLossError: a loss that is infinite or NaN, or not above 0 with `log_losses`.
    """
    for task, loss in zip(tasks, losses, strict=True):
        if not math.isfinite(loss) or (log_losses and loss <= 0):
            expected = "a finite number"
            if log_losses:
                expected += " above 0, because log losses are on"
            raise NonFiniteLossError(
                f"task {task!r}: loss is {loss} {where}; expected {expected}. Lower the learning rate, or look at "
                "this task's labels and predictions."
            )


def check_losses_after_step(tasks: Sequence[str], losses: Tensor, *, where: str) -> None:
    """Refuses losses of the batch with the new parameters that are not finite.

    Args:
        tasks: names.
        losses: [T], replicated.
        where: step and policy, for the message.

    Raises:
        NonFiniteLossError: names the task and the step.
    """
    for task, loss in zip(tasks, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"task {task!r}: loss is {loss} after the update {where}. Lower the learning rate."
            )


@dataclass(frozen=True, kw_only=True)
class BatchLosses:
    """The losses of a global batch, or of a sub-batch, by task; replicated; on the model's device.

    Args:
        plain: [T], detached; L_t, means over valid labels.
        trained: T scalars in the graph; log L_t with log losses, else L_t.
        present: [T] bool; which tasks have any valid label.
    """

    plain: Tensor
    trained: Sequence[Tensor]
    present: Tensor


@dataclass(frozen=True, kw_only=True)
class HostValues:
    """What the host knows of a pass, in tensors on the CPU.

    Args:
        plain: [T] plain losses.
        trained: [T] what the run trains on, log losses or the plain ones.
        present: [T] bool, whether the global batch has any valid label of the task.
        reported: "rep_mtl/<quantity>", those that the batch has a value of.
    """

    plain: Tensor
    trained: Tensor
    present: Tensor
    reported: dict[str, float]


def check_losses_and_gradients(
    tasks: Sequence[str],
    losses: BatchLosses,
    derivatives: TaskDerivatives,
    penalty: Penalty | None,
    *,
    penalty_terms: Mapping[str, Tensor],
    diagnostics: Mapping[str, Tensor],
    workers: Workers,
    log_losses: bool,
    where: str,
) -> HostValues:
    """Values of a pass on the host, once losses and all gradients downstream are known to be finite.

    They get there in one transfer, the only time that the host waits for the device before the
    policy. The check comes before the policy, whose state stays as it was. The encoder's gradients
    do not exist yet; the norm of the update tells of them.

    Args:
        tasks: names, T of them.
        losses: of the pass.
        derivatives: of the losses; own parts.
        penalty, penalty_terms: Rep-MTL's gradients and values; None and empty when they are off.
        diagnostics: scalars, replicated; infinite or NaN where the batch has no value.
        workers: all of them.
        log_losses, where: as for `check_losses`.

    Raises:
        NonFiniteLossError: names the task, or the penalty, and `where`.
    """
    groups = [
        [saliency, *downstream, *head]
        for saliency, downstream, head in zip(
            derivatives.saliency,
            derivatives.downstream_gradients,
            derivatives.head_gradients,
            strict=True,
        )
    ]
    if penalty is not None:
        heads = [gradient for head in penalty.heads for gradient in head]
        terms = [term.reshape(1) for term in penalty_terms.values()]
        groups.append([penalty.representation, *penalty.downstream, *heads, *terms])
    plain = losses.plain
    trained = torch.stack([loss.detach() for loss in losses.trained])
    largest = [largest_entry(group).to(plain.device, torch.float64) for group in groups]
    num_failed = (~torch.stack(largest).isfinite()).double()
    workers.total_([num_failed])
    scalars = {**penalty_terms, **diagnostics}
    parts = [plain, trained, losses.present, num_failed, *(v.reshape(1) for v in scalars.values())]
    on_host = torch.cat([part.double() for part in parts]).cpu()
    on_plain, on_trained, on_present, failures, reported = on_host.split(
        [len(tasks)] * 3 + [len(groups), len(scalars)]
    )
    check_losses(tasks, on_plain.tolist(), log_losses=log_losses, where=where)
    for name, failed in zip([*_quoted(tasks), PENALTY], failures.tolist(), strict=False):
        if failed:
            raise NonFiniteGradientError(
                f"{name}: the gradient is not finite {where}; no parameter was changed. Lower the learning rate, or look "
                "at this loss, its labels and its predictions."
            )
    return HostValues(
        plain=on_plain.to(plain.dtype),
        trained=on_trained.to(trained.dtype),
        present=on_present > 0,
        reported={
            f"rep_mtl/{name}": value
            for name, value in zip(scalars, reported.tolist(), strict=True)
            if math.isfinite(value)
        },
    )


def check_norm(
    norm: float, gradients: Sequence[Tensor], task_pass: TaskPass, *, where: str
) -> None:
    """Refuses an update whose norm is not finite; only then it costs a backward pass per task.

    A finite norm says that every gradient is finite, and its square too, which Adam keeps.

    Args:
        norm: of `gradients`, replicated.
        gradients: what the policy left, by parameter.
        task_pass: that the policy made them of.
        where: step and policy, for the message.

    Raises:
        NonFiniteLossError: names the tasks whose own gradient is not finite, or says that the
            entries are finite and the norm is not.
    """
    if math.isfinite(norm):
        return
    end = f"{where}; no parameter was changed. Lower the learning rate, or look at these losses."
    everyone = f"{', '.join(_quoted(task_pass.tasks))}:"
    largest = float(largest_entry(gradients))
    if math.isfinite(largest):
        raise NonFiniteGradientError(
            f"{everyone} the norm of the gradient overflows, though every entry is finite (the largest is {largest:.3g}), {end}"
        )
    finite = task_pass.jacobian().isfinite().all(dim=1).tolist()
    names = [
        name
        for name, is_finite in zip(_quoted(task_pass.tasks), finite, strict=True)
        if not is_finite
    ]
    penalty = task_pass.global_penalty_gradient()
    if penalty is not None and not math.isfinite(float(largest_entry(penalty))):
        names.append(PENALTY)
    if names:
        raise NonFiniteGradientError(
            f"{', '.join(names)}: the encoder's gradient is not finite {end}"
        )
    raise NonFiniteGradientError(
        f"{everyone} each gradient is finite, but what the policy makes of them is not, {end}"
    )


def _quoted(tasks: Sequence[str]) -> list[str]:
    return [f"task {task!r}" for task in tasks]
