"""Small forward passes for policy tests, and the `TaskPass` that each leaves; float64."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from repmtl_ray.collectives import ALONE
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.task_pass import Penalty, TaskGradients, TaskPass
from repmtl_ray.runs.parameters import moved

BATCHES_AN_EPOCH = 2


def task_names(num_tasks: int) -> tuple[str, ...]:
    return tuple(string.ascii_letters[:num_tasks])


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A pass and the graph that it came from.

    Args:
        task_pass: what a policy sees.
        losses: [T] plain losses, differentiable by `parameters`; an absent task's is 1.
        penalty: scalar, differentiable by `parameters`.
        shared, heads: parameters; heads by task.
        root: the representation in the graph of `losses`.
        losses_now: [T] plain losses at the parameters as they are when it is called; of the batch,
            or of what `TaskPass.look` calls a part or the holdout.
    """

    task_pass: TaskPass
    losses: Tensor
    penalty: Tensor
    shared: list[Parameter]
    heads: list[list[Parameter]]
    root: Tensor
    losses_now: Callable[..., Tensor]

    @property
    def parameters(self) -> list[Parameter]:
        return [*self.shared, *(parameter for head in self.heads for parameter in head)]

    def gradients_of(self, total: Tensor) -> list[Tensor]:
        """Autograd's, by `parameters`."""
        found = torch.autograd.grad(total, self.parameters, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]

    def finished(self) -> list[Tensor]:
        """What the policy left, by `parameters`."""
        return [
            parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None
        ]

    def finished_shared(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.shared if p.grad is not None])


def toy_pass(
    num_tasks: int,
    *,
    seed: int = 0,
    log_losses: bool = False,
    absent: Sequence[int] = (),
    with_penalty: bool = False,
    with_downstream: bool = False,
    loss_scale: float | Sequence[float] = 1.0,
) -> Toy:
    """An encoder (4 -> 5), perhaps a shared layer after it, a linear head a task.

    Args:
        loss_scale: of all losses, or by task.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images = draw(6, 4)
    encoder, after = Parameter(draw(4, 5) / 2), Parameter(draw(5, 5) / 2)
    heads = [[Parameter(draw(5)), Parameter(draw(()))] for _ in range(num_tasks)]
    targets = [draw(6) for _ in range(num_tasks)]
    held_out_images, held_out_targets = draw(6, 4), [draw(6) for _ in range(num_tasks)]
    downstream = [after] if with_downstream else []
    scales = [loss_scale] * num_tasks if isinstance(loss_scale, (int, float)) else loss_scale

    def losses_at(
        representation: Tensor, rows: slice = slice(None), *, holdout: bool = False
    ) -> list[Tensor]:
        hidden = representation @ after if with_downstream else representation
        labels = held_out_targets if holdout else targets
        found = []
        for task, ((slope, offset), target) in enumerate(zip(heads, labels, strict=True)):
            error = (hidden @ slope + offset - target)[rows]
            loss = scales[task] * (error.square().mean() + 0.1)
            found.append(0 * loss + 1 if task in absent else loss)
        return found

    def trained_on(losses: list[Tensor]) -> list[Tensor]:
        return [loss.log() if log_losses else loss for loss in losses]

    def penalty_at(representation: Tensor) -> Tensor:
        own = sum((p.pow(3).sum() for p in downstream), representation.square().sum())
        return own + heads[0][0].sin().sum()

    def differentiated(
        part: tuple[int, int], *, holdout: bool = False, has_penalty: bool = False
    ) -> TaskPass:
        root = torch.tanh((held_out_images if holdout else images) @ encoder)
        leaf = root.detach().requires_grad_()
        columns = [leaf, *downstream]
        plain = losses_at(leaf, slice(part[0], None, part[1]), holdout=holdout)
        trained = trained_on(plain)
        by_task = [
            torch.autograd.grad(loss, [*columns, *head], create_graph=True)
            for loss, head in zip(trained, heads, strict=True)
        ]

        def sub_batch_gradients(num_parts: int) -> list[TaskGradients]:
            parts = []
            for number in range(num_parts):
                losses = trained_on(losses_at(leaf, slice(number, None, num_parts)))
                rows = [torch.autograd.grad(loss, columns, retain_graph=True) for loss in losses]
                parts.append(
                    TaskGradients(
                        saliency=[row[0] for row in rows],
                        downstream_gradients=[row[1:] for row in rows],
                    )
                )
            return parts

        penalty = None
        if has_penalty:
            first, rest = heads[0], heads[1:]
            parts = torch.autograd.grad(penalty_at(leaf), [*columns, first[0]])
            penalty = Penalty(
                representation=parts[0],
                downstream=parts[1 : len(columns)],
                heads=[[parts[-1], None], *([None, None] for _ in rest)],
            )
        found = [[gradient.detach() for gradient in of_task] for of_task in by_task]
        return TaskPass(
            tasks=task_names(num_tasks),
            plain_losses=torch.stack(plain).detach(),
            losses=torch.stack(trained).detach(),
            log_losses=log_losses,
            present=torch.tensor([task not in absent for task in range(num_tasks)]),
            representation=leaf.detach(),
            saliency=[parts[0] for parts in found],
            head_gradients=[parts[len(columns) :] for parts in found],
            head_parameters=heads,
            upstream_parameters=[encoder],
            downstream_parameters=downstream,
            downstream_gradients=[parts[1 : len(columns)] for parts in found],
            encoder_backward=lambda cotangent, parameters=None: torch.autograd.grad(
                root, [encoder], cotangent, retain_graph=True
            ),
            sub_batch_gradients=sub_batch_gradients,
            head_derivatives=lambda task, direction: torch.autograd.grad(
                by_task[task][0], heads[task], direction, retain_graph=True, allow_unused=True
            ),
            look=look,
            losses_at=losses_there,
            learning_rate=0.1,
            penalty=penalty,
            workers=ALONE,
        )

    parameters = [encoder, *downstream, *(parameter for head in heads for parameter in head)]

    @contextlib.contextmanager
    def look(
        moves: Sequence[Tensor] | None = None,
        *,
        part: tuple[int, int] = (0, 1),
        holdout: bool = False,
    ) -> Iterator[TaskPass]:
        with moved(parameters, moves):
            yield differentiated(part, holdout=holdout)

    def losses_of(*, part: tuple[int, int] = (0, 1), holdout: bool = False) -> Tensor:
        root = torch.tanh((held_out_images if holdout else images) @ encoder)
        return torch.stack(losses_at(root, slice(part[0], None, part[1]), holdout=holdout))

    def losses_there(moves: Sequence[Tensor]) -> Tensor:
        with moved(parameters, moves):
            return torch.stack(losses_at(torch.tanh(images @ encoder))).detach()

    task_pass = differentiated((0, 1), has_penalty=with_penalty)
    root = torch.tanh(images @ encoder)
    return Toy(
        task_pass=task_pass,
        losses=torch.stack(losses_at(root)),
        penalty=penalty_at(root),
        shared=[encoder, *downstream],
        heads=heads,
        root=root,
        losses_now=losses_of,
    )


def pass_of(
    jacobian: Tensor,
    plain_losses: Tensor | None = None,
    absent: Sequence[int] = (),
    parts: Callable[[int], Sequence[Tensor]] | None = None,
) -> Toy:
    """A pass whose task gradients are the rows of `jacobian`, at representation and parameters.

    Args:
        jacobian: [T, P].
        plain_losses: [T]; None means ones.
        absent: tasks.
        parts: number of parts -> each part's jacobian; None means the same for all.
    """
    num_tasks, size = jacobian.shape
    encoder = Parameter(jacobian.new_zeros(size))
    heads = [[Parameter(jacobian.new_zeros(()))] for _ in range(num_tasks)]
    parts = parts or (lambda num_parts: [jacobian] * num_parts)
    plain = jacobian.new_ones(num_tasks) if plain_losses is None else plain_losses

    @contextlib.contextmanager
    def look(
        moves: Sequence[Tensor] | None = None,
        *,
        part: tuple[int, int] = (0, 1),
        holdout: bool = False,
    ) -> Iterator[TaskPass]:
        yield task_pass  # the losses are linear, so their gradients are the same everywhere

    task_pass = TaskPass(
        tasks=task_names(num_tasks),
        plain_losses=plain,
        losses=plain,
        log_losses=False,
        present=torch.tensor([task not in absent for task in range(num_tasks)]),
        representation=torch.ones_like(jacobian[0]),
        saliency=list(jacobian),
        head_gradients=[[jacobian.new_tensor(1.0 + task)] for task in range(num_tasks)],
        head_parameters=heads,
        upstream_parameters=[encoder],
        downstream_parameters=[],
        downstream_gradients=[[] for _ in range(num_tasks)],
        encoder_backward=lambda cotangent, parameters=None: [cotangent.clone()],
        sub_batch_gradients=lambda num_parts: [
            TaskGradients(saliency=list(part), downstream_gradients=[[]] * num_tasks)
            for part in parts(num_parts)
        ],
        head_derivatives=lambda task, direction: [None],
        look=look,
        losses_at=lambda moves: plain + jacobian @ moves[0].to(jacobian),
        learning_rate=0.1,
        penalty=None,
        workers=ALONE,
    )
    return Toy(
        task_pass=task_pass,
        losses=plain,
        penalty=plain.new_zeros(()),
        shared=[encoder],
        heads=heads,
        root=task_pass.representation,
        losses_now=lambda: plain,
    )


def drive(
    policy: Policy, steps: range, num_tasks: int, *, absent_at: Sequence[int] = ()
) -> list[list[Tensor]]:
    """Runs a policy through passes that depend on the step alone, with epochs and second looks.

    Args:
        policy: has done `steps.start` steps.
        steps: which to run; an epoch has `BATCHES_AN_EPOCH`.
        num_tasks: T.
        absent_at: steps at which the last task is absent.

    Returns:
        The finished gradients, by step.
    """
    finished = []
    for step in steps:
        epoch, batch = divmod(step, BATCHES_AN_EPOCH)
        if batch == 0:
            policy.begin_epoch(epoch)
        absent = [num_tasks - 1] if step in absent_at else []
        toy = toy_pass(num_tasks, seed=step, absent=absent)
        policy.backward(toy.task_pass)
        while policy.wants_another_update:
            toy = toy_pass(num_tasks, seed=step, absent=absent, loss_scale=0.9)
            policy.backward(toy.task_pass)
        finished.append(toy.finished())
        if policy.needs_losses_after_step:
            policy.after_optimizer_step(second_losses(toy, step))
        if batch == BATCHES_AN_EPOCH - 1:
            policy.end_epoch()
    return finished


def second_losses(toy: Toy, seed: int) -> Tensor:
    """[T] losses as if the optimiser had made a step; an absent task's stays 1."""
    generator = torch.Generator().manual_seed(seed)
    losses = toy.task_pass.plain_losses
    change = 0.8 + 0.3 * torch.rand(len(losses), generator=generator, dtype=losses.dtype)
    return torch.where(toy.task_pass.present, losses * change, losses)
