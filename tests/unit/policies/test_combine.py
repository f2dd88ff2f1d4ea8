"""`Policy.combine`, for training loops of one's own: the same update as in this project's loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repmtl_ray import policies
from repmtl_ray.policies.base import Policy
from tests.helpers.passes import BATCHES_AN_EPOCH, second_losses, toy_pass
from tests.helpers.policy_examples import BEYOND_GRADIENTS, MULTI_TASK, make

NEEDS_MORE = ("MTAdam", "MoDo", "SDMGrad", *BEYOND_GRADIENTS)
COMBINING = [name for name in MULTI_TASK if name not in NEEDS_MORE]


def updates(policy: Policy, *, by_combine: bool, absent_at: int, log_losses: bool) -> list[Tensor]:
    """The shared parameters' gradient in six steps of two batches per epoch."""
    combined = []
    for step in range(6):
        epoch, batch = divmod(step, BATCHES_AN_EPOCH)
        if batch == 0:
            policy.begin_epoch(epoch)
        absent = [2] if step == absent_at else []
        toy = toy_pass(3, seed=step, absent=absent, log_losses=log_losses)
        task_pass = toy.task_pass
        if by_combine:
            gradients = task_pass.jacobian()
            combined.append(
                policy.combine(
                    gradients,
                    task_pass.plain_losses,
                    present=task_pass.present,
                    log_losses=log_losses,
                )
            )
        else:
            policy.backward(task_pass)
            combined.append(toy.finished_shared())
        if policy.needs_losses_after_step:
            policy.after_optimizer_step(second_losses(toy, step))
        if batch == BATCHES_AN_EPOCH - 1:
            policy.end_epoch()
    return combined


@pytest.mark.parametrize("log_losses", [False, True])
@pytest.mark.parametrize("name", COMBINING)
def test_combine_makes_the_update_of_this_projects_loop(name: str, log_losses: bool) -> None:
    policy, other = make(name, log_losses=log_losses), make(name, log_losses=log_losses)
    expected = updates(policy, by_combine=False, absent_at=3, log_losses=log_losses)
    combined = updates(other, by_combine=True, absent_at=3, log_losses=log_losses)
    torch.testing.assert_close(combined, expected)
    assert policy.last_head_weights is not None
    torch.testing.assert_close(other.last_head_weights, policy.last_head_weights)
    assert str(policy.state_dict()) == str(other.state_dict())


@pytest.mark.parametrize("name", NEEDS_MORE)
def test_a_policy_that_needs_more_than_gradients_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' needs more than one gradient per task"):
        make(name).combine(torch.eye(3), torch.ones(3))


def test_a_policy_is_built_by_its_name_for_a_training_loop() -> None:
    policy = policies.build("CAGrad", num_tasks=2, c=0.0)
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(policy.combine(gradients, torch.ones(2)), gradients.sum(dim=0))
    assert policy.metrics() == {"weight/task_0": 1.0, "weight/task_1": 1.0, "solver_failures": 0.0}


def test_combine_does_not_change_the_gradients_that_it_gets() -> None:
    for name in COMBINING:
        gradients = toy_pass(3).task_pass.jacobian()
        before = gradients.clone()
        make(name).combine(gradients, torch.ones(3))
        assert torch.equal(gradients, before), name


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (torch.ones(2, 4), r"shape \(2, 4\) .*expected .*\[3, size\].*\(a, b, c\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(3, 4, dtype=torch.int64), r"type torch\.int64"),
        (torch.full((3, 4), torch.nan), "the gradient of task 'a', 'b', 'c' is not finite"),
    ],
)
def test_gradients_that_are_not_one_row_per_task_are_refused(
    gradients: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=f"policy 'UPGrad': .*{message}"):
        make("UPGrad").combine(gradients, torch.ones(3))


def test_losses_that_are_not_one_number_per_task_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"policy 'UW': the argument losses has shape \(2,\); expected \(3,\)"
    ):
        make("UW").combine(torch.eye(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"policy 'UW': the argument present has shape \(3, 1\)"):
        make("UW").combine(torch.eye(3), torch.ones(3), present=torch.ones(3, 1) > 0)


def test_a_training_loop_of_ones_own_minimises_two_tasks() -> None:
    """The loop that docs/methods.md shows: FairGrad on two regression tasks of a linear encoder."""
    torch.manual_seed(0)
    inputs, encoder = torch.randn(64, 5), torch.nn.Linear(5, 4)
    heads = [torch.nn.Linear(4, 1) for _ in range(2)]
    targets = [inputs @ torch.randn(5, 1) for _ in heads]
    shared = list(encoder.parameters())
    own = [list(head.parameters()) for head in heads]
    optimizer = torch.optim.Adam([*shared, *own[0], *own[1]], lr=0.02)
    policy = policies.build("FairGrad", num_tasks=2)
    totals = []
    for _ in range(150):
        features = encoder(inputs)
        losses = [
            (head(features) - target).square().mean()
            for head, target in zip(heads, targets, strict=True)
        ]
        rows = [
            torch.cat(
                [part.flatten() for part in torch.autograd.grad(loss, shared, retain_graph=True)]
            )
            for loss in losses
        ]
        combined = policy.combine(torch.stack(rows), torch.stack(losses))
        for weight, loss, parameters in zip(policy.last_head_weights, losses, own, strict=True):
            for parameter, part in zip(
                parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True
            ):
                parameter.grad = weight.to(part) * part
        for parameter, part in zip(
            shared, combined.split([p.numel() for p in shared]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        totals.append(sum(loss.item() for loss in losses))
    assert totals[-1] < 0.05 * totals[0]


def test_absent_tasks_have_no_influence_whatever_their_rows_hold() -> None:
    gradients = toy_pass(3).task_pass.jacobian()
    present = torch.tensor([True, False, True])
    for name in COMBINING:
        arguments = {"TrimmedMean": {"trim_number": 0}}.get(name, {})
        zero, other = gradients.clone(), gradients.clone()
        zero[1], other[1] = 0, 5 - other[1]
        combined = [
            make(name, **arguments).combine(rows, torch.ones(3), present=present)
            for rows in (zero, other)
        ]
        torch.testing.assert_close(combined[0], combined[1], msg=name)
