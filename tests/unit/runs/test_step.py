"""One step: its gradient against plain autograd, its cost, its errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import ExperimentError, NonFiniteLossError, PolicyConfig
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.graph_split import split_graph_at
from repmtl_ray.saliency import align_task_rows, task_saliency
from tests.helpers.runs import (
    DENSE,
    OFFICE,
    dense_batch,
    office_batch,
    policy_config,
    small_model,
    small_stepper,
)


def gradient_of_total(
    model: Any, tasks: Any, batch: Any, *, log_losses: Any, regularizer: Any, representation: Any
) -> Any:
    """Equation 10 in one piece: no split, one backward through everything."""
    captured = []
    module = model.get_submodule(representation)
    handle = module.register_forward_hook(lambda _m, _i, output: captured.append(output))
    features = model.encoder(batch.images)
    handle.remove()
    losses = []
    for task in tasks:
        prediction = model.predict(
            task.name, features[batch.rows[task.name]], batch.images.shape[-2:]
        )
        total, count = task.loss_sum(prediction, batch.targets[task.name])
        loss = total / count
        losses.append(loss.log() if log_losses else loss)
    objective = sum(losses)
    if any(regularizer):
        saliency = task_saliency(losses, captured[0])
        saliency = align_task_rows(list(saliency), [batch.rows[task.name] for task in tasks])
        objective = objective + sum(RepMTL(*regularizer).terms(saliency).values())
    return torch.autograd.grad(objective, list(model.parameters()))


@pytest.mark.parametrize("representation", ["encoder", "encoder.2"])
@pytest.mark.parametrize("regularizer", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.7), (0.9, 0.7)])
@pytest.mark.parametrize("log_losses", [True, False])
@pytest.mark.parametrize("kind", ["dense", "office"])
def test_a_step_follows_the_gradient_of_equation_10(
    kind: str, log_losses: bool, regularizer: tuple[float, ...], representation: str
) -> None:
    policy = PolicyConfig(name="EW", log_losses=log_losses)
    tasks, batch = (
        (DENSE, dense_batch(0, ALONE)) if kind == "dense" else (OFFICE, office_batch(0, ALONE))
    )
    options = {"regularizer": regularizer, "representation": representation}
    stepper = small_stepper(ALONE, policy, tasks=tasks, learning_rate=1.0, **options)
    reference = small_model(tasks, ALONE)
    expected = gradient_of_total(reference, tasks, batch, log_losses=log_losses, **options)
    stepper.step(batch, global_step=0)
    for before, after, gradient in zip(
        reference.parameters(), stepper.model.parameters(), expected, strict=True
    ):
        torch.testing.assert_close(before - after, gradient, rtol=1e-9, atol=1e-12)


def count_encoder_backwards(policy: Any, regularizer: Any) -> int:
    stepper = small_stepper(ALONE, policy, regularizer=regularizer)
    passes = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(lambda _gradient: passes.append(1))

    stepper.model.encoder[0].register_forward_hook(watch)
    stepper.step(dense_batch(0, ALONE), global_step=0)
    return len(passes)


@pytest.mark.parametrize(
    ("policy", "regularizer", "backwards"),
    [
        (policy_config("EW"), (0.0, 0.0), 1),
        (policy_config("EW"), (0.9, 0.7), 1),
        (policy_config("FAMO"), (0.9, 0.7), 1),
        (policy_config("UPGrad"), (0.0, 0.0), 2),
        (policy_config("UPGrad"), (0.9, 0.7), 3),
        (policy_config("MGDA", gradients="representation"), (0.9, 0.7), 1),
        (policy_config("GradDrop", gradients="representation"), (0.9, 0.7), 1),
        (policy_config("IMTL", gradients="representation"), (0.9, 0.7), 1),
        (policy_config("GradNorm"), (0.9, 0.7), 1),
        (policy_config("DB-MTL"), (0.0, 0.0), 2),
        (policy_config("MTAdam"), (0.9, 0.7), 3),
        (policy_config("MoDo"), (0.9, 0.7), 5),
        (policy_config("SDMGrad"), (0.0, 0.0), 5),
    ],
)
def test_encoder_backwards_are_as_few_as_promised(
    policy: Any, regularizer: tuple[float, ...], backwards: int
) -> None:
    assert count_encoder_backwards(policy, regularizer) == backwards


def watched_pass(policy: Any, **options: Any) -> tuple[Any, ...]:
    """A stepper, and a function that makes a step and returns what `look` makes of its pass."""
    stepper = small_stepper(ALONE, policy, **options)
    looked = []

    def step(look: Any) -> Any:
        original = type(stepper.policy).backward

        def backward(task_pass: Any) -> None:
            looked.append(look(task_pass))
            original(stepper.policy, task_pass)

        stepper.policy.backward = backward
        stepper.step(dense_batch(0, ALONE), global_step=0)
        return looked[0]

    return stepper, step


@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_are_the_rows_in_turn_and_add_up_to_the_batch(num_parts: int) -> None:
    policy = PolicyConfig(name="MoDo", log_losses=False)
    _, step = watched_pass(policy, regularizer=(0.9, 0.7), head="linear")  # no batch norm in it
    parts, whole = step(
        lambda task_pass: (task_pass.sub_batch_gradients(num_parts), list(task_pass.saliency))
    )
    batch = dense_batch(0, ALONE)
    valid = (
        (batch.targets["segmentation"] >= 0).sum(dim=(1, 2)),
        (batch.targets["depth"] > 0).sum(dim=(1, 2, 3)),
    )
    for task, labels in enumerate(valid):
        total = torch.zeros_like(whole[task])
        for number, part in enumerate(parts):
            outside = [row for row in range(4) if row % num_parts != number]
            assert part.saliency[task][outside].abs().max() == 0
            total += part.saliency[task] * labels[number::num_parts].sum() / labels.sum()
        torch.testing.assert_close(total, whole[task])


def test_a_batch_with_fewer_rows_than_parts_is_explained() -> None:
    stepper = small_stepper(ALONE, policy_config("SDMGrad"))
    with pytest.raises(
        ExperimentError, match=r"batch_size is 2, but policy 'SDMGrad'.* at least 3"
    ):
        stepper.step(dense_batch(0, ALONE, size=2), global_step=0)


def test_gradnorm_sees_the_gradients_of_the_last_shared_kernel() -> None:
    stepper, step = watched_pass(policy_config("GradNorm"))
    last, everything = step(lambda p: (p.last_layer_jacobian(), p.jacobian()))
    kernel, bias = stepper.model.encoder[3].weight, stepper.model.encoder[3].bias
    columns = everything[:, -kernel.numel() - bias.numel() : -bias.numel()]
    torch.testing.assert_close(last, columns)


def test_a_policy_that_makes_the_update_takes_rate_schedule_and_decay_from_the_optimiser() -> None:
    stepper = small_stepper(ALONE, policy_config("MTAdam"))
    stepper.optimizer.param_groups[0]["weight_decay"] = 0.5
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper.optimizer, lambda epoch: 0.5**epoch)
    for step, rate in enumerate((0.05, 0.025)):
        before = {name: value.clone() for name, value in stepper.model.named_parameters()}
        updates = {}
        original = stepper.policy.backward

        def backward(task_pass: Any, original: Any = original, updates: Any = updates) -> None:
            original(task_pass)
            for name, value in stepper.model.named_parameters():
                updates[name] = value.grad.clone()

        stepper.policy.backward = backward
        values = stepper.step(dense_batch(step, ALONE), global_step=step)
        stepper.policy.backward = original
        for name, value in stepper.model.named_parameters():
            expected = before[name] * (1 - rate * 0.5) - rate * updates[name]
            torch.testing.assert_close(value, expected)
        norm = torch.stack([update.norm() for update in updates.values()]).norm()
        assert values["gradient_norm"] == pytest.approx(float(norm))
        scheduler.step()
    assert not stepper.optimizer.state_dict()["state"]


def test_second_look_leaves_statistics_and_parameters_alone() -> None:
    batch = dense_batch(0, ALONE)
    with_look = small_stepper(ALONE, policy_config("FAMO"))
    without = small_stepper(ALONE, policy_config("FAMO"))
    type(without.policy).needs_losses_after_step, original = (
        False,
        type(without.policy).needs_losses_after_step,
    )
    try:
        without.step(batch, global_step=0)
    finally:
        type(without.policy).needs_losses_after_step = original
    with_look.step(batch, global_step=0)
    for left, right in zip(
        with_look.model.state_dict().values(), without.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right)


def test_reported_values_are_means_over_valid_labels() -> None:
    stepper = small_stepper(ALONE, policy_config("EW"), regularizer=(0.9, 0.7))
    batch = dense_batch(0, ALONE)
    reference = small_model(stepper.tasks, ALONE)
    values = stepper.step(batch, global_step=0)
    prediction = reference(batch.images)["depth"]
    valid = batch.targets["depth"] > 0
    expected = (prediction - batch.targets["depth"]).abs()[valid].mean()
    assert values["depth/train_loss"] == pytest.approx(expected.item())
    assert set(values) == {
        "segmentation/train_loss",
        "depth/train_loss",
        "rep_mtl/tsr",
        "rep_mtl/csa",
        "rep_mtl/dominance",
        "rep_mtl/specialisation",
        "rep_mtl/gradient_share",
        *(
            f"rep_mtl/{quantity}/{task}"
            for quantity in ("alignment", "effective_rank", "channel_mean")
            for task in ("segmentation", "depth")
        ),
        "gradient_norm",
    }


@pytest.mark.parametrize("name", ["EW", "GLS", "UPGrad", "DWA"])
def test_a_batch_without_a_tasks_labels_trains_the_others(name: str) -> None:
    stepper = small_stepper(ALONE, policy_config(name), regularizer=(0.9, 0.7))
    before = [parameter.clone() for parameter in stepper.model.heads["depth"].parameters()]
    shared = [parameter.clone() for parameter in stepper.model.encoder.parameters()]
    stepper.policy.begin_epoch(0)
    stepper.step(dense_batch(0, ALONE, absent="depth"), global_step=0)
    for old, new in zip(before, stepper.model.heads["depth"].parameters(), strict=True):
        assert torch.equal(old, new)
    assert any(
        not torch.equal(old, new)
        for old, new in zip(shared, stepper.model.encoder.parameters(), strict=True)
    )
    assert all(torch.isfinite(tensor).all() for tensor in stepper.model.state_dict().values())


def test_a_non_finite_loss_names_task_policy_and_step_and_changes_nothing() -> None:
    stepper = small_stepper(ALONE, policy_config("PCGrad"))
    with torch.no_grad():
        next(stepper.model.heads["depth"].parameters()).fill_(float("nan"))
    before = [parameter.clone() for parameter in stepper.model.encoder.parameters()]
    with pytest.raises(
        NonFiniteLossError, match=r"task 'depth': loss is nan at step 5 with policy 'PCGrad'"
    ):
        stepper.step(dense_batch(0, ALONE), global_step=4)
    for old, new in zip(before, stepper.model.encoder.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_loss_of_zero_cannot_be_logged() -> None:
    stepper = small_stepper(ALONE, policy_config("EW"))
    batch = dense_batch(0, ALONE)
    prediction = stepper.model(batch.images)["depth"].detach()
    assert (prediction > 0).any()
    targets = {**batch.targets, "depth": prediction.clamp(min=0)}
    with pytest.raises(
        NonFiniteLossError, match=r"loss is 0.0 .* finite number above 0, because log losses are on"
    ):
        stepper.step(dataclasses.replace(batch, targets=targets), global_step=0)


def test_csa_with_one_sample_is_explained() -> None:
    stepper = small_stepper(ALONE, policy_config("EW"), regularizer=(0.0, 0.9))
    with pytest.raises(ValueError, match="global batch of 1 sample"):
        stepper.step(dense_batch(0, ALONE, size=1), global_step=0)


def test_a_module_that_hands_over_no_tensor_cannot_be_the_representation() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: Any) -> tuple[Any, ...]:
            return x, x

    module = Pair()
    with (
        pytest.raises(ValueError, match="Pair gives tuple; expected a tensor"),
        split_graph_at(module),
    ):
        module(torch.ones(1))


def test_unequal_rows_are_paired_by_position_and_padded() -> None:
    saliency = [torch.randn(5, 2), torch.randn(5, 2)]
    paired = align_task_rows(saliency, [slice(0, 3), slice(3, 5)])
    assert paired.shape == (2, 3, 2)
    assert torch.equal(paired[0], saliency[0][:3])
    assert torch.equal(paired[1, :2], saliency[1][3:])
    assert torch.equal(paired[1, 2], torch.zeros(2))
