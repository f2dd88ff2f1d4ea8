"""The penalty with a bounded strength: against two plain gradients, for every policy, workers, restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import ExperimentError, ModelConfig, RegularizerConfig
from repmtl_ray.penalties import divergence_loss
from repmtl_ray.policies.task_pass import TaskPass
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs import build
from repmtl_ray.saliency import align_task_rows, task_saliency
from tests.helpers.gloo import Pool
from tests.helpers.runs import (
    DENSE,
    OFFICE,
    dense_batch,
    office_batch,
    parameters_after,
    policy_config,
    small_model,
    small_stepper,
)
from tests.helpers.training import run, small_experiment, state_of

SHARE = 0.3
LAMBDAS = (0.9, 0.7)
Through = Literal["all", "encoder"]
POLICIES = [
    name
    for name in policies.names()
    if name not in ("stl", "MTAdam", "Sel-Update")  # this one makes several updates a step
    and policies.class_of(name).allows_share
]


@dataclasses.dataclass
class Reference:
    """Plain autograd on the whole graph: no split, no policy, EW on log losses.

    Args:
        model: before the step.
        task_gradient, penalty_gradient: g and G at the representation.
        of_losses, of_penalty: by parameter of the model.
    """

    model: Any
    task_gradient: Tensor
    penalty_gradient: Tensor
    of_losses: list[Tensor]
    of_penalty: list[Tensor]

    @property
    def scale(self) -> Tensor:
        return SHARE * self.task_gradient.norm() / self.penalty_gradient.norm()


def printed(saliency: Tensor) -> Tensor:
    return torch.stack(list(RepMTL(*LAMBDAS).terms(saliency).values())).sum()


def reference_of(
    tasks: Any,
    batch: Any,
    *,
    representation: str = "encoder",
    penalty_of: Callable[[Tensor], Tensor] = printed,
) -> Reference:
    model = small_model(tasks, ALONE)
    captured: list[Tensor] = []
    module = model.get_submodule(representation)
    handle = module.register_forward_hook(lambda _m, _i, output: captured.append(output))
    features = model.encoder(batch.images)
    handle.remove()
    losses = []
    for task in tasks:
        rows, size = features[batch.rows[task.name]], batch.images.shape[-2:]
        loss_sum, count = task.loss_sum(
            model.predict(task.name, rows, size), batch.targets[task.name]
        )
        losses.append((loss_sum / count).log())
    saliency = task_saliency(losses, captured[0])
    aligned = align_task_rows(list(saliency), [batch.rows[task.name] for task in tasks])
    penalty = penalty_of(aligned)
    objective = torch.stack(losses).sum()
    parameters = list(model.parameters())

    def gradients(value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            value, [captured[0], *parameters], retain_graph=True, allow_unused=True
        )
        like = [captured[0], *parameters]
        return [torch.zeros_like(x) if y is None else y for x, y in zip(like, found, strict=True)]

    at_losses, *of_losses = gradients(objective)
    at_penalty, *of_penalty = gradients(penalty)
    return Reference(model, at_losses, at_penalty, of_losses, of_penalty)


def update_of(stepper: Any, batch: Any) -> list[Tensor]:
    """What one step subtracts from each parameter; the learning rate must be 1."""
    before = [parameter.detach().clone() for parameter in stepper.model.parameters()]
    stepper.policy.begin_epoch(0)
    stepper.step(batch, global_step=0)
    after = stepper.model.parameters()
    return [old - new.detach() for old, new in zip(before, after, strict=True)]


@pytest.mark.parametrize("representation", ["encoder", "encoder.2"])
@pytest.mark.parametrize("through", ["all", "encoder"])
@pytest.mark.parametrize("kind", ["dense", "office"])
def test_a_share_is_what_two_plain_gradients_make(
    kind: str, through: Through, representation: str
) -> None:
    dense = kind == "dense"
    tasks, batch = (DENSE, dense_batch(0, ALONE)) if dense else (OFFICE, office_batch(0, ALONE))
    expected = reference_of(tasks, batch, representation=representation)
    stepper = small_stepper(
        ALONE,
        policy_config("EW"),
        tasks=tasks,
        learning_rate=1.0,
        regularizer=LAMBDAS,
        share=SHARE,
        through=through,
        representation=representation,
    )
    upstream = {"encoder": ("encoder.",), "encoder.2": ("encoder.0.", "encoder.1.")}[representation]
    names = [name for name, _ in stepper.model.named_parameters()]
    for name, found, of_losses, of_penalty in zip(
        names, update_of(stepper, batch), expected.of_losses, expected.of_penalty, strict=True
    ):
        reached = through == "all" or name.startswith(upstream)
        total = of_losses + expected.scale * of_penalty if reached else of_losses
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gets_the_share_of_its_own_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty adds share (|g| / |G|) G, where g is what the policy gives the encoder: at the
    representation, or at the encoder's parameters where the policy combines gradients there."""
    tasks, batch = (
        (OFFICE, office_batch(0, ALONE)) if name == "Krum" else (DENSE, dense_batch(0, ALONE))
    )
    options: Any = {"tasks": tasks, "learning_rate": 1.0}
    at_parameters: list[bool] = []
    cotangents: list[Tensor] = []
    original = TaskPass.finish_with_direction

    def finish(self: TaskPass, direction: Tensor, head_weights: Tensor, **options: Any) -> None:
        at_parameters.append(True)
        original(self, direction, head_weights, **options)

    monkeypatch.setattr(TaskPass, "finish_with_direction", finish)
    plain = small_stepper(ALONE, policy_config(name), **options)
    backward = plain.policy.backward

    def watched(task_pass: TaskPass) -> None:
        def encoder_backward(cotangent: Tensor, parameters: Any = None) -> Any:
            cotangents.append(cotangent)
            return task_pass.encoder_backward(cotangent, parameters)

        backward(dataclasses.replace(task_pass, encoder_backward=encoder_backward))

    monkeypatch.setattr(plain.policy, "backward", watched)
    without = update_of(plain, batch)
    bounded = small_stepper(
        ALONE,
        policy_config(name),
        regularizer=LAMBDAS,
        share=SHARE,
        through="encoder",
        **options,
    )
    found = update_of(bounded, batch)
    expected = reference_of(tasks, batch)
    num_encoder = len(list(bounded.model.encoder.parameters()))

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts[:num_encoder]])

    of_penalty, added = flat(expected.of_penalty), flat(found) - flat(without)
    if at_parameters:
        scale = SHARE * flat(without).norm() / of_penalty.norm()
    else:
        scale = SHARE * cotangents[-1].norm() / expected.penalty_gradient.norm()
    assert scale > 0
    torch.testing.assert_close(added, scale * of_penalty, rtol=1e-8, atol=1e-12)
    for left, right in zip(found[num_encoder:], without[num_encoder:], strict=True):
        torch.testing.assert_close(left, right)  # heads follow their tasks alone


def test_through_the_encoder_without_a_share_leaves_the_penalty_its_size() -> None:
    batch = dense_batch(0, ALONE)
    expected = reference_of(DENSE, batch)
    stepper = small_stepper(
        ALONE, policy_config("EW"), learning_rate=1.0, regularizer=LAMBDAS, through="encoder"
    )
    names = [name for name, _ in stepper.model.named_parameters()]
    for name, found, of_losses, of_penalty in zip(
        names, update_of(stepper, batch), expected.of_losses, expected.of_penalty, strict=True
    ):
        total = of_losses + of_penalty if name.startswith("encoder.") else of_losses
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EW", {"through": "encoder", "no_depth_at": (1,)}),
        ("EW", {"through": "all", "representation": "encoder.2"}),
        ("UW", {"through": "all", "tasks": OFFICE}),
        ("MoDo", {"through": "encoder"}),
        ("DB-MTL", {"through": "all"}),
        ("PCGrad", {"through": "encoder"}),
    ],
)
def test_a_share_is_the_same_on_two_workers_as_on_one(
    pool_of: Callable[[int], Pool], name: str, options: dict[str, Any]
) -> None:
    policy, options = policy_config(name), {"regularizer": LAMBDAS, "share": SHARE, **options}
    start = parameters_after(ALONE, policy, options, 0)
    expected = parameters_after(ALONE, policy, options)
    for found in pool_of(2).run(parameters_after, policy, options):
        assert (found - expected).norm() <= 1e-6 * (expected - start).norm()


def test_a_restart_inside_an_epoch_changes_nothing(scenes_cache: Path, tmp_path: Path) -> None:
    experiment = small_experiment(regularizer__share=0.1, regularizer__through="encoder")
    whole = run(experiment, checkpoints=tmp_path, save_at=(3,))
    continued = run(experiment, resume_from=whole.inside[3])
    assert continued.history == whole.history
    for left, right in zip(
        state_of(continued.parts)["model"].values(),
        state_of(whole.parts)["model"].values(),
        strict=True,
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"regularizer.share is .*> 0 and <= 1"):
        RegularizerConfig(share=share)


def test_a_share_of_no_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match=r"regularizer.share is 0.1 .*no penalty to bound"):
        RegularizerConfig(lambda_tsr=0, lambda_csa=0, share=0.1)


def test_a_policy_that_makes_its_own_update_refuses_a_share() -> None:
    experiment = small_experiment(policy__name="MTAdam", regularizer__share=0.1)
    with pytest.raises(
        ExperimentError, match=r"share is 0.1, but policy 'MTAdam' makes the update"
    ):
        build.selected_tasks(experiment)


def test_through_the_encoder_refuses_shared_layers_behind_the_representation() -> None:
    with pytest.raises(ValueError, match=r"through is 'encoder' with .*follow their tasks alone"):
        dataclasses.replace(
            small_experiment(regularizer__through="encoder"),
            model=ModelConfig(
                encoder="test_efficientnet", head="linear", representation="encoder.blocks.2"
            ),
        )


def test_a_random_direction_has_the_norm_of_the_share_and_draws_anew_at_each_step() -> None:
    batch = dense_batch(0, ALONE)
    expected = reference_of(DENSE, batch)
    found = {}
    for step in (0, 1):
        stepper = dataclasses.replace(
            small_stepper(
                ALONE,
                policy_config("EW"),
                regularizer=LAMBDAS,
                share=SHARE,
                through="encoder",
            ),
            direction="random",
        )
        cotangents: list[Tensor] = []
        backward = stepper.policy.backward

        def watched(
            task_pass: TaskPass, cotangents: Any = cotangents, backward: Any = backward
        ) -> None:
            def encoder_backward(cotangent: Tensor, parameters: Any = None) -> Any:
                cotangents.append(cotangent)
                return task_pass.encoder_backward(cotangent, parameters)

            backward(dataclasses.replace(task_pass, encoder_backward=encoder_backward))

        stepper.policy.backward = watched
        stepper.step(batch, global_step=step)
        found[step] = cotangents[-1] - expected.task_gradient
        ratio = found[step].norm() / expected.task_gradient.norm()
        assert float(ratio) == pytest.approx(SHARE, rel=1e-9)
        cosine = torch.nn.functional.cosine_similarity(
            found[step].reshape(1, -1), expected.penalty_gradient.reshape(1, -1)
        )
        assert abs(float(cosine)) < 0.3
    assert not torch.allclose(found[0], found[1])


def test_the_flipped_direction_is_the_opposite() -> None:
    batch = dense_batch(0, ALONE)
    updates = {}
    for direction in ("penalty", "flipped"):
        stepper = small_stepper(
            ALONE, policy_config("EW"), regularizer=LAMBDAS, share=SHARE, learning_rate=1.0
        )
        updates[direction] = update_of(dataclasses.replace(stepper, direction=direction), batch)
    expected = reference_of(DENSE, batch)
    for up, down, of_losses in zip(
        updates["penalty"], updates["flipped"], expected.of_losses, strict=True
    ):
        torch.testing.assert_close(up + down, 2 * of_losses, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("direction", ["random", "divergence"])
@pytest.mark.parametrize("tasks", [DENSE, OFFICE], ids=["dense", "office"])
def test_a_direction_of_a_study_is_the_same_on_two_workers(
    pool_of: Callable[[int], Pool], tasks: Any, direction: str
) -> None:
    options = {"tasks": tasks, "regularizer": LAMBDAS, "share": SHARE, "through": "encoder"}
    options["direction"] = direction
    expected = parameters_after(ALONE, policy_config("EW"), options)
    start = parameters_after(ALONE, policy_config("EW"), options, 0)
    for found in pool_of(2).run(parameters_after, policy_config("EW"), options):
        assert (found - expected).norm() <= 1e-6 * (expected - start).norm()


def test_the_direction_of_the_divergence_is_that_of_its_own_gradient() -> None:
    batch = dense_batch(0, ALONE)
    updates = {}
    for direction in ("penalty", "divergence"):
        stepper = small_stepper(
            ALONE,
            policy_config("EW"),
            regularizer=LAMBDAS,
            share=SHARE,
            through="encoder",
            learning_rate=1.0,
            representation="encoder.2",
            direction=direction,
        )
        updates[direction] = update_of(stepper, batch)
    expected = reference_of(DENSE, batch, representation="encoder.2", penalty_of=divergence_loss)
    names = [name for name, _ in stepper.model.named_parameters()]
    for name, found, of_losses, of_penalty in zip(
        names, updates["divergence"], expected.of_losses, expected.of_penalty, strict=True
    ):
        reached = name.startswith(("encoder.0.", "encoder.1."))
        total = of_losses + expected.scale * of_penalty if reached else of_losses
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(updates["penalty"][0], updates["divergence"][0])


def test_a_random_direction_for_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="through 'encoder' with direction 'random'"):
        RegularizerConfig(direction="random", share=0.1)
