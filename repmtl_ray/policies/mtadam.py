"""MTAdam: Adam with moments for each task, whose gradients are first brought to one norm.

Owns the method and its moments. It makes the update itself (`Policy.makes_update`); the step
subtracts it times the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from repmtl_ray.policies.arguments import (
    Decay,
    NonNegative,
    Number,
    NumberPerTask,
    OneTask,
    PerTask,
)
from repmtl_ray.policies.base import Policy
from repmtl_ray.policies.checks import require_finite_gradients
from repmtl_ray.policies.state import read_state, require_names, write_state
from repmtl_ray.policies.task_pass import TaskPass

PENALTY = "penalty"
"""The key of the penalty's term; a task's is its number."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the gradient of a term lies among all parameters, flat: shared ones, then heads.

    Args:
        shared: numbers of elements, by shared parameter.
        heads: by task, by head parameter.
    """

    shared: Sequence[int]
    heads: Sequence[Sequence[int]]

    @property
    def num_total(self) -> int:
        return sum(self.sizes_of(PENALTY))

    def sizes_of(self, key: str) -> list[int]:
        """Numbers of elements of the parameters that a term has a gradient for."""
        heads = self.heads if key == PENALTY else [self.heads[int(key)]]
        return [*self.shared, *(size for head in heads for size in head)]

    def places_of(self, key: str) -> list[slice]:
        """The parts of the flat vector of all parameters that a term's own vector consists of."""
        if key == PENALTY:
            return [slice(0, self.num_total)]
        num_shared, task = sum(self.shared), int(key)
        start = num_shared + sum(sum(head) for head in self.heads[:task])
        return [slice(0, num_shared), slice(start, start + sum(self.heads[task]))]


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
    ranks: Annotated[PerTask, NumberPerTask(Number(above=0))] = 1.0

    name = "MTAdam"
    makes_update = True

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.tasks.index(self.anchor)
        self.order = [first, *(task for task in range(len(self.tasks)) if task != first)]
        self.betas = (self.beta1, self.beta2)
        self.terms: dict[str, _Term] = {}
        self._loaded: dict[str, Any] = {}

    def backward(self, task_pass: TaskPass) -> None:
        jacobian, heads = task_pass.jacobian(), task_pass.global_head_gradients()
        rows = [
            torch.cat([row, *(gradient.reshape(-1) for gradient in head)])
            for row, head in zip(jacobian, heads, strict=True)
        ]
        is_finite = torch.tensor([bool(row.isfinite().all()) for row in rows])
        require_finite_gradients(self.name, self.tasks, self.step + 1, is_finite)
        penalty = task_pass.global_penalty_gradient()
        gradients = {str(task): rows[task] for task in self.order if task_pass.present[task]}
        if penalty is not None:
            gradients[PENALTY] = torch.cat([gradient.reshape(-1) for gradient in penalty])
        layout = _Layout(
            shared=[parameter.numel() for parameter in task_pass.shared],
            heads=[[p.numel() for p in parameters] for parameters in task_pass.head_parameters],
        )
        self._make_terms(gradients, layout, jacobian)
        self._learn(gradients, len(layout.shared))
        parameters = [*task_pass.shared, *(p for head in task_pass.head_parameters for p in head)]
        parts = self._update(gradients, layout, jacobian).split([p.numel() for p in parameters])
        task_pass.finish_with_update(
            [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        )
        self.step += 1

    def _make_terms(self, needed: Iterable[str], layout: _Layout, like: Tensor) -> None:
        """Makes the moments of every term of this step, and of every term in the checkpoint."""
        for key in (*needed, *self._loaded):
            if key not in self.terms:
                self.terms[key] = _Term(layout.sizes_of(key), like)
                if key in self._loaded:
                    write_state(self.terms[key], _Term.state_names, self._loaded[key], self.name)
            self.terms[key].move_to(like)
        self._loaded = {}

    def _learn(self, gradients: Mapping[str, Tensor], num_shared: int) -> None:
        """Moves the moments of the terms of this step, with task gradients at the anchor's norm."""
        tasks = [key for key in gradients if key != PENALTY]
        for key in tasks:
            self.terms[key].average_norms(gradients[key], self.norm_beta)
        anchors = self._anchor_norms(num_shared)
        ranks = torch.tensor(self.ranks, dtype=torch.float64)
        for key in tasks:
            term = self.terms[key]
            scales = self._scales(term.norms, anchors) * ranks[int(key)]
            term.learn(gradients[key] * term.by_coordinate(scales), self.betas)
        if PENALTY in gradients:
            self.terms[PENALTY].learn(gradients[PENALTY], self.betas)

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

    def _update(self, terms: Iterable[str], layout: _Layout, like: Tensor) -> Tensor:
        """Flat, by parameter: the terms' means by the largest root mean square among them."""
        total, largest = like.new_zeros(layout.num_total), like.new_zeros(layout.num_total)
        for key in terms:
            mean, root = self.terms[key].corrected(self.betas, self.eps)
            first = 0
            for place in layout.places_of(key):
                part = slice(first, first + place.stop - place.start)
                total[place] += mean[part]
                largest[place] = torch.maximum(largest[place], root[part])
                first = part.stop
        return torch.where(largest > 0, total / torch.where(largest > 0, largest, 1.0), 0.0)

    def _state(self) -> dict[str, Any]:
        learnt = {key: read_state(term, _Term.state_names) for key, term in self.terms.items()}
        return {"terms": {**self._loaded, **learnt}}

    def _load_state(self, state: dict[str, Any]) -> None:
        require_names(("terms",), state, self.name)
        known = {*map(str, range(len(self.tasks))), PENALTY}
        if not set(state["terms"]) <= known:
            raise ValueError(
                f"policy {self.name!r}: the checkpoint holds moments of terms "
                f"{', '.join(state['terms'])}, expected at most {len(self.tasks)} tasks and the "
                "penalty; resume with the tasks that wrote it."
            )
        self.terms, self._loaded = {}, dict(state["terms"])
