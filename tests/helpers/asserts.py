"""What every policy must hold to, whatever its method."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from repmtl_ray.policies.base import Policy
from tests.helpers.passes import (
    BATCHES_AN_EPOCH,
    Toy,
    drive,
    pass_of,
    second_losses,
    task_names,
    toy_pass,
)

Make = Callable[[], Policy]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a trip through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes(
    make: Make, num_tasks: int, *, moments: Sequence[int], absent_at: Sequence[int] = ()
) -> None:
    """A policy loaded from a checkpoint after any of `moments` steps goes on bit by bit."""
    policy = make()
    states = {0: saved_and_loaded(policy.state_dict())}
    unbroken = []
    for step in range(max(moments) + 3):
        unbroken += drive(policy, range(step, step + 1), num_tasks, absent_at=absent_at)
        states[step + 1] = policy.state_dict()  # kept while the policy goes on: must be a copy
    for moment in moments:
        resumed = make()
        resumed.load_state_dict(saved_and_loaded(states[moment]))
        steps = range(moment, moment + 3)
        found = drive(resumed, steps, num_tasks, absent_at=absent_at)
        for step, gradients in zip(steps, found, strict=True):
            for got, expected in zip(gradients, unbroken[step], strict=True):
                assert torch.equal(got, expected), f"resumed after {moment}, differs at {step}"
        assert_same(resumed.state_dict(), states[moment + 3])


def assert_same(got: Any, expected: Any) -> None:
    """Equal states, bit by bit; unknown numbers (nan) equal each other."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(got[key], value)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == expected


def assert_penalty_is_added(make: Make, num_tasks: int) -> None:
    """The gradient with a penalty minus the one without is the penalty's own."""
    for with_downstream in (False, True):
        without = toy_pass(num_tasks, with_downstream=with_downstream)
        with_it = toy_pass(num_tasks, with_downstream=with_downstream, with_penalty=True)
        make().backward(without.task_pass)
        make().backward(with_it.task_pass)
        expected = with_it.gradients_of(with_it.penalty)
        triples = zip(with_it.finished(), without.finished(), expected, strict=True)
        for got, base, of_penalty in triples:
            torch.testing.assert_close(got - base, of_penalty)


def assert_absent_task_is_left_out(make: Callable[[Sequence[str]], Policy]) -> None:
    """With one of three tasks absent, the update is that of a policy that never knew it."""
    with_it, without = make(("a", "b", "c")), make(("a", "b"))
    for step in range(5):
        for policy in (with_it, without):
            policy.begin_epoch(step)
        three = toy_pass(3, seed=step, absent=[2])
        two = pass_like(three, range(2))
        with_it.backward(three.task_pass)
        without.backward(two.task_pass)
        torch.testing.assert_close(three.finished_shared(), two.finished_shared())
        for policy, toy in ((with_it, three), (without, two)):
            if policy.needs_losses_after_step:
                policy.after_optimizer_step(0.9 * toy.task_pass.plain_losses)
            policy.end_epoch()
    returned = toy_pass(3, seed=9)
    with_it.backward(returned.task_pass)
    assert_finite(returned)


def assert_order_of_tasks_does_not_matter(
    make: Callable[[Sequence[str]], Policy], order: Sequence[int], *, steps: int = 5
) -> None:
    """With the tasks in another order, the shared update is the same.

    Args:
        make: from the tasks' names in their order.
        order: of as many tasks.
        steps: two an epoch.
    """
    names = task_names(len(order))
    usual, other = make(names), make([names[task] for task in order])
    for step in range(steps):
        toy = toy_pass(len(order), seed=step, with_downstream=True)
        toys = (pass_like(toy, range(len(order))), pass_like(toy, order))
        for policy, each in zip((usual, other), toys, strict=True):
            if step % BATCHES_AN_EPOCH == 0:
                policy.begin_epoch(step // BATCHES_AN_EPOCH)
            policy.backward(each.task_pass)
            if policy.needs_losses_after_step:
                policy.after_optimizer_step(0.9 * each.task_pass.plain_losses)
            if step % BATCHES_AN_EPOCH == BATCHES_AN_EPOCH - 1:
                policy.end_epoch()
        left, right = (each.finished_shared() for each in toys)
        size = left.abs().max()  # solvers stop at a tolerance of the whole
        torch.testing.assert_close(left / size, right / size, rtol=1e-4, atol=1e-6)


def assert_loss_scale_does_not_matter(
    make: Make, scales: Sequence[float], *, up_to_length: bool, log_losses: bool, steps: int = 6
) -> None:
    """With each task's loss in other units, the shared update is the same.

    Args:
        make: a policy.
        scales: by task.
        up_to_length: only the update's direction is.
        log_losses: whether the run trains on them.
        steps: two an epoch.
    """
    usual, scaled = make(), make()
    for step in range(steps):
        found = []
        for policy, scale in ((usual, 1.0), (scaled, scales)):
            if step % BATCHES_AN_EPOCH == 0:
                policy.begin_epoch(step // BATCHES_AN_EPOCH)
            toy = toy_pass(len(scales), seed=step, loss_scale=scale, log_losses=log_losses)
            policy.backward(toy.task_pass)
            if policy.needs_losses_after_step:
                policy.after_optimizer_step(second_losses(toy, step))
            if step % BATCHES_AN_EPOCH == BATCHES_AN_EPOCH - 1:
                policy.end_epoch()
            update = toy.finished_shared()
            found.append(update / update.norm() if up_to_length else update)
        size = found[0].norm()  # solvers stop at a tolerance of the whole
        torch.testing.assert_close(found[0] / size, found[1] / size, rtol=1e-4, atol=2e-4)


def pass_like(toy: Toy, tasks: Sequence[int]) -> Toy:
    """The same gradients at the shared parameters, of some of the tasks in this order."""
    task_pass, chosen = toy.task_pass, list(tasks)
    return pass_of(
        task_pass.jacobian()[chosen],
        task_pass.plain_losses[chosen],
        parts=lambda num_parts: [
            task_pass.jacobian(part)[chosen] for part in task_pass.sub_batch_gradients(num_parts)
        ],
    )


def assert_finite(toy: Toy) -> None:
    for gradient in toy.finished():
        assert gradient.isfinite().all()


def assert_draws_by_seed_and_step(make: Callable[[int], Policy], num_tasks: int) -> None:
    """Draws are equal for equal (seed, step), whatever else was drawn, and else differ."""

    def update(seed: int, step: int) -> Tensor:
        policy = make(seed)
        policy.step = step
        torch.rand(1)
        toy = toy_pass(num_tasks)
        before = torch.get_rng_state()
        policy.backward(toy.task_pass)
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        return toy.finished_shared()

    assert torch.equal(update(1, 5), update(1, 5))
    assert not torch.equal(update(1, 5), update(1, 6))
    assert not torch.equal(update(1, 5), update(2, 5))
