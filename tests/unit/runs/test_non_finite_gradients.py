"""Gradients that are not finite never reach a parameter, an optimiser or a policy's state."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from repmtl_ray import policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import NonFiniteLossError
from repmtl_ray.runs import loop
from repmtl_ray.runs.checkpoint import Parts
from repmtl_ray.runs.graph_split import differentiate_tasks
from repmtl_ray.runs.loss_scale import LossScale
from repmtl_ray.runs.step import Stepper
from tests.helpers.gloo import Pool
from tests.helpers.parameters import mostly_slow
from tests.helpers.runs import dense_batch, policy_config, small_stepper
from tests.helpers.training import run, small_experiment

POLICIES = [name for name in policies.names() if name not in ("stl", "Krum")]
"""All that train two tasks."""
GRADIENT_POLICIES = ("UPGrad", "MTAdam", "MoCo", "GradNorm", "FAMO")
PLACES = ("head", "encoder", "penalty")


def spoil(stepper: Stepper, place: str, value: float) -> RemovableHandle:
    """Makes one gradient of the next step `value`: of depth's head, the encoder or the penalty."""
    head = stepper.model.heads["depth"].output.weight
    parameter = next(stepper.model.encoder.parameters()) if place == "encoder" else head
    calls = []

    def hook(gradient: Tensor) -> Tensor:
        calls.append(1)  # depth's loss is differentiated first, then the penalty
        return gradient if place == "penalty" and len(calls) < 2 else gradient * value

    return parameter.register_hook(hook)


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, torch.as_tensor(state) if isinstance(state, (float, Tensor)) else state


def snapshot(stepper: Stepper) -> dict[str, Any]:
    state = {
        "parameters": dict(stepper.model.named_parameters()),
        "optimizer": stepper.optimizer.state_dict(),
        "policy": stepper.policy.state_dict(),
    }
    return copy.deepcopy(dict(leaves(state)))


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    assert set(before) == set(after)
    return {
        path
        for path, value in before.items()
        if not (
            torch.equal(value.nan_to_num(nan=-7.0), after[path].nan_to_num(nan=-7.0))
            if isinstance(value, Tensor)
            else value == after[path]
        )
    }


def failing_step(
    workers: Workers, name: str, place: str, value: float, clip: float | None, spoiled_rank: int = 0
) -> tuple[str, set[str], dict[str, Any]]:
    """The message of the third step, whose gradient is spoilt, what it changed, and its state."""
    stepper = small_stepper(workers, policy_config(name), regularizer=(0.9, 0.7), head="linear")
    object.__setattr__(stepper, "max_gradient_norm", clip)
    stepper.policy.begin_epoch(0)
    for step in range(2):
        stepper.step(dense_batch(step, workers), global_step=step)
    if workers.rank == spoiled_rank:
        spoil(stepper, place, value)
    before = snapshot(stepper)
    with pytest.raises(NonFiniteLossError) as error:
        stepper.step(dense_batch(2, workers), global_step=2)
    after = snapshot(stepper)
    assert all(parameter.grad is None for parameter in stepper.model.parameters())
    return str(error.value), differing(before, after), after


@pytest.mark.parametrize(
    ("value", "clip"), [(math.inf, None), pytest.param(math.nan, 1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", POLICIES)
def test_a_gradient_that_is_not_finite_changes_nothing(
    name: str, place: str, value: float, clip: float | None
) -> None:
    message, changed, state = failing_step(ALONE, name, place, value, clip)
    assert "at step 3" in message
    assert f"policy {name!r}" in message
    assert ("Rep-MTL's penalty" if place == "penalty" else "task") in message
    assert "'segmentation'" not in message or place == "encoder"
    if place == "encoder":  # found after the policy has seen the losses, which are finite
        learnt = {path for path in changed if path.startswith(".policy")}
        assert all(torch.as_tensor(state[path]).isfinite().all() for path in learnt)
        changed -= learnt
    assert not changed


def scaled_stepper(workers: Workers, name: str) -> Stepper:
    stepper = small_stepper(workers, policy_config(name), regularizer=(0.9, 0.7), head="linear")
    return dataclasses.replace(stepper, loss_scale=LossScale())


@pytest.mark.parametrize("name", POLICIES)
def test_scaled_losses_change_no_bit_of_a_step_that_does_not_overflow(name: str) -> None:
    found = []
    for loss_scale in (None, LossScale()):
        stepper = dataclasses.replace(scaled_stepper(ALONE, name), loss_scale=loss_scale)
        stepper.policy.begin_epoch(0)
        for step in range(2):
            stepper.step(dense_batch(step, ALONE), global_step=step)
        found.append(snapshot(stepper))
    assert not differing(*found)


def skipped_step(
    workers: Workers, name: str, place: str, spoiled_rank: int = 0
) -> tuple[set[str], list[dict[str, float]], dict[str, Any]]:
    """What a step whose gradient is spoilt changed, the metrics of it and of the next, and the
    state after that."""
    stepper = scaled_stepper(workers, name)
    stepper.policy.begin_epoch(0)
    for step in range(2):
        stepper.step(dense_batch(step, workers), global_step=step)
    before = snapshot(stepper)
    with contextlib.ExitStack() as spoilt:
        if workers.rank == spoiled_rank:
            spoilt.callback(spoil(stepper, place, math.inf).remove)
        metrics = [stepper.step(dense_batch(2, workers), global_step=2)]
    changed = differing(before, snapshot(stepper))
    metrics.append(stepper.step(dense_batch(3, workers), global_step=3))
    return changed, metrics, snapshot(stepper)


@pytest.mark.parametrize("place", mostly_slow(PLACES, ("encoder",)))
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(name: str, place: str) -> None:
    changed, (skipped, after), _ = skipped_step(ALONE, name, place)
    assert not changed
    assert skipped == {"loss_scale": 65536.0}
    assert after["loss_scale"] == 32768.0
    assert math.isfinite(after["gradient_norm"])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["EW", *GRADIENT_POLICIES])
def test_every_worker_skips_a_step_that_overflows_on_one(
    name: str, place: str, pool_of: Callable[[int], Pool]
) -> None:
    first, second = pool_of(2).run(skipped_step, name, place, 1)
    assert not first[0]
    assert first[1] == second[1]
    assert not differing(first[2], second[2])


def test_a_gradient_that_overflows_unscaled_is_an_error() -> None:
    stepper = dataclasses.replace(scaled_stepper(ALONE, "EW"), loss_scale=LossScale(scale=1.0))
    spoil(stepper, "head", math.inf)
    with pytest.raises(NonFiniteLossError, match=r"task 'depth': the gradient is not finite"):
        stepper.step(dense_batch(0, ALONE), global_step=0)


def test_a_gradient_too_small_for_float16_survives_scaled() -> None:
    leaf = torch.ones(4, requires_grad=True)
    found = {}
    for scale in (1.0, 65536.0):
        loss = (leaf.half() * 1.0).float().mean() * 1e-8
        derivatives = differentiate_tasks(
            [loss], leaf, shared=[], may_be_downstream=False, heads=[[]], scale=scale
        )
        found[scale] = derivatives.saliency[0]
    assert not found[1.0].any()
    torch.testing.assert_close(found[65536.0], torch.full((4,), 2.5e-9), rtol=0.01, atol=0)


def workers_fail(workers: Workers, name: str, place: str) -> tuple[str, bool]:
    message, changed, _ = failing_step(workers, name, place, math.inf, None, spoiled_rank=1)
    return message, any(not path.startswith(".policy") for path in changed)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["EW", *GRADIENT_POLICIES])
def test_every_worker_raises_for_a_gradient_of_one(
    name: str, place: str, pool_of: Callable[[int], Pool]
) -> None:
    answers = pool_of(2).run(workers_fail, name, place)
    assert answers[0] == answers[1]
    message, changed = answers[0]
    assert "at step 3" in message
    assert not changed


def test_a_norm_that_overflows_is_told_apart_from_a_gradient() -> None:
    stepper = small_stepper(ALONE, policy_config("EW"), head="linear")
    before = snapshot(stepper)
    spoil(stepper, "head", 1e200)
    with pytest.raises(
        NonFiniteLossError,
        match=r"norm of the gradient overflows, though every entry is finite \(the largest is .*e\+.* at step 1",
    ):
        stepper.step(dense_batch(0, ALONE), global_step=0)
    assert differing(before, snapshot(stepper)) == {".policy.step"}


def test_a_loss_that_diverges_in_the_update_does_not_reach_the_policy() -> None:
    stepper = small_stepper(ALONE, policy_config("FAMO"), learning_rate=1e300)
    seen: list[Tensor] = []
    stepper.policy.second_look = seen.append  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLossError, match=r"after the update at step 1 with policy 'FAMO'"):
        stepper.step(dense_batch(0, ALONE), global_step=0)
    assert not seen


def test_a_run_whose_gradient_is_not_finite_leaves_only_the_checkpoints_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scenes_cache: Path
) -> None:
    build = loop.build

    def build_spoiled(*arguments: Any, **options: Any) -> Parts:
        parts = build(*arguments, **options)
        calls: list[int] = []

        def hook(gradient: Tensor) -> Tensor:
            calls.append(1)
            return gradient * (math.inf if len(calls) == 4 else 1.0)

        next(parts.model.heads["depth"].parameters()).register_hook(hook)
        return parts

    monkeypatch.setattr(loop, "build", build_spoiled)
    experiment = small_experiment(regularizer__lambda_tsr=0.0, regularizer__lambda_csa=0.0)
    with pytest.raises(NonFiniteLossError, match=r"task 'depth': .* at step 4 with policy 'EW'"):
        run(experiment, checkpoints=tmp_path, save_at=(3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after-1", "step-3"]
