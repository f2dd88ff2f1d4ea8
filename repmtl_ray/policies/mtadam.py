"""MTAdam: Adam with moments for each task, whose gradients are first brought to one norm.

Owns the method and its moments. It makes the update itself (`Policy.makes_update`); the step
subtracts it times the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import Decay, NonNegative, NumberPerTask, OneTask, PerTask
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.state import read_state, require_names, write_state
from repmtl_ray.policies.task_pass import TaskPass


class _Term:
    """One loss term's moving averages: of its gradient, its square, and its norm by tensor.

    Args:
        sizes: of the parameter tensors that the term has a gradient for, flat.
        like: decides dtype and device.
    """

    state_names = ("first", "second", "norms", "num_steps")

    def __init__(self, sizes: Sequence[int], like: Tensor) -> None:
        self.sizes = list(sizes)
        self.first = like.new_zeros(sum(sizes))
        self.second = torch.zeros_like(self.first)
        self.norms = torch.zeros(len(sizes), dtype=torch.float64)
        self.num_steps = 0

    def average_norms(self, gradient: Tensor, beta: float) -> None:
        norms = torch.stack(
            [
                torch.linalg.vector_norm(part, dtype=torch.float64)
                for part in gradient.split(self.sizes)
            ]
        ).cpu()
        self.norms = norms if self.num_steps == 0 else beta * self.norms + (1 - beta) * norms

    def by_coordinate(self, values: Tensor) -> Tensor:
        """Each tensor's value, repeated for its coordinates."""
        sizes = torch.tensor(self.sizes, device=self.first.device)
        return values.to(self.first).repeat_interleave(sizes)

    def move_to(self, like: Tensor) -> None:
        self.first, self.second = self.first.to(like), self.second.to(like)

    def learn(self, gradient: Tensor, betas: tuple[float, float]) -> None:
        self.num_steps += 1
        self.first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])

    def corrected(self, betas: tuple[float, float], eps: float) -> tuple[Tensor, Tensor]:
        """The bias-corrected mean, and the root of the mean square plus eps."""
        mean = self.first / (1 - betas[0] ** self.num_steps)
        return mean, (self.second / (1 - betas[1] ** self.num_steps)).sqrt().add_(eps)


@dataclass(kw_only=True, eq=False)
class MTAdam(Policy):
    """MTAdam: the sum of the tasks' Adam means over the largest of their root mean squares, each
    gradient scaled in every parameter tensor to the anchor task's average norm.

    The anchor of a tensor is the first of the anchor task and the others in order that has a norm
    there, so a head follows plain Adam on its own task. An absent task adds nothing and its moments
    wait. Rep-MTL's penalty is a term of its own with its own moments, at its own norm: scaled to
    the anchor's, its coefficients would mean nothing. Zero gradients stay zero; any finite ones are
    fine, as no update is larger than Adam's by more than the number of terms.

    What becomes of the optimiser: its learning rate and schedule scale the update; its own
    adaptation, momentum and moments are not used; its weight decay is decoupled, as AdamW's;
    `max_gradient_norm` is refused.

    Args:
        anchor: the task whose norms the others take.
        beta1, beta2, eps: Adam's.
        norm_beta: decay of the norms.
        ranks: per task, its share of the anchor's norm.

    Source:
        Malkiel and Wolf, "MTAdam", EMNLP 2021, arXiv:2006.14683, algorithm 1, and its code. Norms
        are kept here, per task, where the code hides them on parameters; a norm counts from above 0
        where the code has 1e-10; the code adds weight decay to every term's gradient, so T times.
        State: two moments for each task, of the shared parameters and its head, and for the
        penalty; norms; counts. Memory: 2 (T + 1) times the shared parameters.
    """

    anchor: OneTask = None
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    norm_beta: Decay = 0.9
    eps: NonNegative = 1e-8
    ranks: Annotated[PerTask, NumberPerTask(above=0)] = 1.0

    name = "MTAdam"
    makes_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.tasks.index(self.anchor)
        self.order = [first, *(task for task in range(len(self.tasks)) if task != first)]
        self.betas = (self.beta1, self.beta2)
        self.terms: dict[str, _Term] = {}  # by the task's number, and "penalty"
        self._loaded: dict[str, Any] = {}

    def backward(self, task_pass: TaskPass) -> None:
        jacobian, heads = task_pass.jacobian(), task_pass.global_head_gradients()
        flat_heads = [torch.cat([jacobian[0, :0], *(g.reshape(-1) for g in h)]) for h in heads]
        is_finite = [
            bool(row.isfinite().all() and head.isfinite().all())
            for row, head in zip(jacobian, flat_heads, strict=True)
        ]
        require_finite_gradients(self.name, self.tasks, self.step + 1, torch.tensor(is_finite))
        penalty = task_pass.global_penalty_gradient()
        sizes = [parameter.numel() for parameter in task_pass.shared]
        by_head = [[p.numel() for p in parameters] for parameters in task_pass.head_parameters]
        present = [task for task in self.order if task_pass.present[task]]
        ranks = torch.tensor(self.ranks, dtype=torch.float64)
        self._make_terms(present, penalty is not None, sizes, by_head, jacobian)
        gradients = {task: torch.cat([jacobian[task], flat_heads[task]]) for task in present}
        for task in present:
            self.terms[str(task)].average_norms(gradients[task], self.norm_beta)
        anchors = self._anchor_norms(len(sizes))
        for task in present:
            term = self.terms[str(task)]
            scales = self._scales(term.norms, anchors) * ranks[task]
            term.learn(gradients[task] * term.by_coordinate(scales), self.betas)
        if penalty is not None:
            flat = torch.cat([part.reshape(-1) for part in penalty])
            self.terms["penalty"].learn(flat, self.betas)
        update = self._update(present, penalty is not None, sum(sizes), by_head, jacobian)
        parameters = [*task_pass.shared, *(p for h in task_pass.head_parameters for p in h)]
        parts = update.split([parameter.numel() for parameter in parameters])
        task_pass.finish_with_update(
            [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        )
        self.step += 1

    def _make_terms(
        self,
        present: Sequence[int],
        with_penalty: bool,
        shared: Sequence[int],
        by_head: Sequence[Sequence[int]],
        like: Tensor,
    ) -> None:
        """Makes the moments of every term of this step, and of every term in the checkpoint."""
        needed = [*map(str, present), *(["penalty"] if with_penalty else []), *self._loaded]
        for key in needed:
            if key not in self.terms:
                heads = by_head if key == "penalty" else [by_head[int(key)]]
                sizes = [*shared, *(size for head in heads for size in head)]
                self.terms[key] = _Term(sizes, like)
                if key in self._loaded:
                    write_state(self.terms[key], _Term.state_names, self._loaded[key], self.name)
            self.terms[key].move_to(like)
        self._loaded = {}

    def _anchor_norms(self, num_shared: int) -> Tensor:
        """By shared tensor, the average norm of the first task in order that has one; else 0."""
        anchors = torch.zeros(num_shared, dtype=torch.float64)
        for key in map(str, self.order):
            if key in self.terms:
                anchors = torch.where(anchors > 0, anchors, self.terms[key].norms[:num_shared])
        return anchors

    def _scales(self, norms: Tensor, anchors: Tensor) -> Tensor:
        """By tensor of a term: the anchor's norm by its own; a head is its own anchor."""
        own = norms[len(anchors) :]
        ratio = torch.cat([anchors, own]) / torch.where(norms > 0, norms, 1.0)
        return torch.where(norms > 0, ratio, 1.0)

    def _update(
        self,
        present: Sequence[int],
        with_penalty: bool,
        num_shared: int,
        by_head: Sequence[Sequence[int]],
        like: Tensor,
    ) -> Tensor:
        """Flat, by parameter: the terms' means by the largest root mean square among them."""
        starts = [num_shared]
        for head in by_head:
            starts.append(starts[-1] + sum(head))
        total, largest = like.new_zeros(starts[-1]), like.new_zeros(starts[-1])

        def add(where: slice, mean: Tensor, root: Tensor) -> None:
            total[where] += mean
            largest[where] = torch.maximum(largest[where], root)

        for task in present:
            mean, root = self.terms[str(task)].corrected(self.betas, self.eps)
            add(slice(0, num_shared), mean[:num_shared], root[:num_shared])
            add(slice(starts[task], starts[task + 1]), mean[num_shared:], root[num_shared:])
        if with_penalty:
            add(slice(0, starts[-1]), *self.terms["penalty"].corrected(self.betas, self.eps))
        return torch.where(largest > 0, total / torch.where(largest > 0, largest, 1.0), 0.0)

    def _state(self) -> dict[str, Any]:
        learnt = {key: read_state(term, _Term.state_names) for key, term in self.terms.items()}
        return {"terms": {**self._loaded, **learnt}}

    def _load_state(self, state: dict[str, Any]) -> None:
        require_names(("terms",), state, self.name)
        known = {*map(str, range(len(self.tasks))), "penalty"}
        if not set(state["terms"]) <= known:
            raise ValueError(
                f"policy {self.name!r}: the checkpoint holds moments of terms "
                f"{', '.join(state['terms'])}, expected at most {len(self.tasks)} tasks and the "
                "penalty; resume with the tasks that wrote it."
            )
        self.terms, self._loaded = {}, dict(state["terms"])
