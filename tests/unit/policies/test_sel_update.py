"""Selective task group updates, against a float64 transcription of the official loop, and affinity
propagation against scikit-learn's."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation
from torch import Tensor

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import PolicyConfig
from repmtl_ray.policies.affinity_propagation import clusters_of
from tests.helpers.passes import Toy, task_names, toy_pass
from tests.helpers.policy_examples import make
from tests.helpers.runs import dense_batch, policy_config, small_stepper

TASKS, RATE = 4, 0.2


def groups_by_scikit(similarities: Any) -> list[set[int]] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)
        labels = found.fit_predict(similarities)
    settled = found.n_iter_ < 200 and labels.min() >= 0
    return [set(np.flatnonzero(labels == k)) for k in np.unique(labels)] if settled else None


def as_sets(labels: Tensor | None) -> list[set[int]] | None:
    if labels is None:
        return None
    return [set(np.flatnonzero(labels.numpy() == k)) for k in np.unique(labels.numpy())]


@pytest.mark.parametrize("num", [2, 3, 5, 9])
def test_clusters_are_scikit_learns(num: int) -> None:
    sizes = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(num, 2)) + 3 * rng.integers(0, 2, size=(num, 1))
        similarities = -np.square(points[:, None] - points[None]).sum(axis=-1) / 4
        similarities += 0.05 * rng.normal(size=(num, num))  # equal pairs are ties, left to noise
        torch.manual_seed(seed)
        found = as_sets(clusters_of(torch.from_numpy(similarities)))
        assert found == groups_by_scikit(similarities), (num, seed)
        sizes.add(len(found or []))
    assert num < 5 or len(sizes) > 1


class Official:
    """The loop as the code has it, in plain Python."""

    def __init__(self, beta: float, warmup: int, *, books_to_previous: bool) -> None:
        self.beta, self.warmup, self.books_to_previous = beta, warmup, books_to_previous
        self.affinity = np.zeros((TASKS, TASKS))
        self.groups: list[set[int]] = [{task} for task in range(TASKS)]

    def order(self, step: int, affinities: Tensor) -> list[set[int]]:
        """From the policy's own averages: these are found equal but for rounding, and ties are not
        stable under it."""
        torch.manual_seed(zlib.crc32(f"policy 0 {step}".encode()))
        affinity = affinities.numpy()
        own = np.diag(affinity)
        if step >= self.warmup and (own > 0).all():
            x = affinity / own[None, :]
            self.groups = as_sets(clusters_of(torch.from_numpy((x + x.T) / 2))) or self.groups
        order = [self.groups[k] for k in torch.randperm(len(self.groups))]
        return order * 2 if len(order) == 1 else order

    def update(self, group: set[int], before: list[float], now: list[float]) -> None:
        for s in group:
            for t in range(TASKS):
                affin_t = (1 - now[t] / before[t]) / len(group)
                affin_s = (1 - now[s] / before[s]) / len(group)
                if t in group and t == s and affin_t < 0:
                    continue
                if t in group and affin_t * affin_s < 0:
                    affin_t = -max(affin_t, affin_s)
                self.affinity[s, t] = (1 - self.beta) * self.affinity[s, t] + self.beta * affin_t


def place(toy: Toy, values: list[Tensor]) -> None:
    for parameter, value in zip(toy.parameters, values, strict=True):
        parameter.data, parameter.grad = value.clone(), None


@pytest.mark.parametrize("credit", ["present", "previous"])
def test_updates_and_groups_are_the_official_codes(credit: str) -> None:
    policy = make("Sel-Update", TASKS, beta=0.3, warmup_steps=2, credit=credit)
    official = Official(0.3, 2, books_to_previous=credit == "previous")
    ours = [parameter.data.clone() for parameter in toy_pass(TASKS).parameters]
    theirs, numbers = [value.clone() for value in ours], set()
    for step in range(15):
        last: tuple[set[int], list[float]] | None = None
        for number, group in enumerate(official.order(step, policy.affinities)):
            toy = toy_pass(TASKS, seed=step)
            place(toy, theirs)
            losses = toy.losses_now()
            if last is not None:
                booked = last[0] if official.books_to_previous else group
                official.update(booked, last[1], losses.tolist())
            last = (group, losses.tolist())
            total = torch.stack([losses[task] for task in sorted(group)]).sum()
            gradient = toy.gradients_of(total)
            theirs = [v - RATE * g for v, g in zip(theirs, gradient, strict=True)]

            assert policy.wants_another_update == (number > 0)
            place(toy, ours)
            with toy.task_pass.look() as task_pass:
                policy.backward(task_pass)
            for task, head in enumerate(toy.heads):
                assert all((p.grad is None) == (task not in group) for p in head)
            ours = [p.data if p.grad is None else p.data - RATE * p.grad for p in toy.parameters]
        assert not policy.wants_another_update
        numbers.add(len(official.groups))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(policy.affinities, official.affinity, rtol=1e-9, atol=1e-12)
    assert len(numbers) > 1, "groups never changed"


def test_an_affinity_is_as_computed_by_hand() -> None:
    policy = make("Sel-Update", 2)
    policy._average([0.1, -0.05], [0], [0, 1])
    torch.testing.assert_close(
        policy.affinities, torch.tensor([[1e-4, -5e-5], [0.0, 0.0]], dtype=torch.float64)
    )


def test_other_heads_do_not_move_with_adams_momentum() -> None:
    """In a real step every group moves its own heads alone, once."""
    stepper = small_stepper(ALONE, policy_config("Sel-Update"))
    seen: list[set[str]] = []
    original = stepper.optimizer.step

    def watched(*arguments: Any, **named: Any) -> Any:
        before = {n: next(h.parameters()).detach().clone() for n, h in stepper.model.heads.items()}
        result = original(*arguments, **named)
        after = stepper.model.heads.items()
        seen.append({n for n, h in after if not torch.equal(before[n], next(h.parameters()))})
        return result

    stepper.optimizer.step = watched
    for step in range(3):
        stepper.step(dense_batch(step, ALONE), global_step=step)
    assert len(seen) == 6
    assert all(len(names) == 1 for names in seen)
    assert all(seen[k] | seen[k + 1] == {"segmentation", "depth"} for k in (0, 2, 4))
    assert stepper.policy.step == 3


def test_a_penalty_reaches_the_heads_of_the_group_alone() -> None:
    toys = [toy_pass(3, with_penalty=flag, with_downstream=True) for flag in (False, True)]
    for toy in toys:
        make("Sel-Update").backward(toy.task_pass)
    penalty = toys[1].gradients_of(toys[1].penalty)
    for without, with_it, of_penalty in zip(
        toys[0].parameters, toys[1].parameters, penalty, strict=True
    ):
        assert (without.grad is None) == (with_it.grad is None)
        if with_it.grad is not None:
            torch.testing.assert_close(with_it.grad - without.grad, of_penalty)


def test_it_is_no_base_of_another_policy() -> None:
    config = PolicyConfig(name="SAMO", arguments={"base": "Sel-Update"})
    with pytest.raises(ValueError, match="'Sel-Update', which updates in turns"):
        policies.build(config, task_names(2))
