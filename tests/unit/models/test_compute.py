"""When an encoder computes otherwise, what it refuses, and that a run goes on after a restart.

That the results are the same is in `tests/unit/runs/test_devices.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import ComputeConfig, ExperimentError, ModelConfig, digest, replace
from repmtl_ray.models import build_model
from repmtl_ray.models.compute import use_compute
from tests.helpers.asserts import assert_same
from tests.helpers.gloo import Pool
from tests.helpers.runs import (
    DENSE,
    dense_batch,
    parameters_after,
    policy_config,
    small_stepper,
)
from tests.helpers.training import run, small_experiment, state_of


def test_the_default_is_not_in_the_digest_and_everything_else_is() -> None:
    plain = small_experiment()
    other = replace(plain, {"compute.channels_last": True})
    assert digest(replace(other, {"compute": ComputeConfig()})) == digest(plain) == "390f945d40d7"
    assert digest(other) != digest(plain)


@pytest.mark.usefixtures("scenes_cache")
def test_a_run_goes_on_after_a_restart_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options = ("channels_last", "checkpointing", "fused")
    experiment = small_experiment(
        compute__encoder_parts=2, **{f"compute__{name}": True for name in options}
    )
    whole = run(experiment, checkpoints=tmp_path)
    resumed = run(experiment, resume_from=whole.checkpoints[1])
    assert whole.history == resumed.history
    assert_same(state_of(whole.parts), state_of(resumed.parts))


def test_a_compiled_encoder_is_used_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            calls.append(len(inputs))
            return function(*inputs)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    stepper, batch = small_stepper(ALONE, policy_config("EW")), dense_batch(0, ALONE)
    names = list(stepper.model.state_dict())
    use_compute(stepper.model, ComputeConfig(compile=True))
    stepper.step(batch, global_step=0)
    assert calls == [1]
    stepper.model.eval()(batch.images)
    assert calls == [1]
    assert list(stepper.model.state_dict()) == names


@pytest.mark.parametrize("features", ["map", "pooled"])
def test_checkpointing_computes_stages_again(features: Any) -> None:
    config = ModelConfig(encoder="resnet10t", features=features, output_stride=None, head="linear")
    model = build_model(config, DENSE if features == "map" else [], image_size=(32, 32))
    use_compute(model, ComputeConfig(checkpointing=True))
    calls = []
    model.encoder.layer2[0].register_forward_pre_hook(lambda *_: calls.append(1))
    features_of = model.encoder(torch.rand(2, 3, 32, 32))
    assert len(calls) == 1
    features_of.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("encoder", ["resnet10t", "test_efficientnet", "densenet121"])
def test_checkpointing_leaves_no_activation_in_place(encoder: str) -> None:
    """Not every release of timm needs it, so this shows it with all of them."""

    def in_place(model: nn.Module) -> int:
        return sum(getattr(module, "inplace", False) is True for module in model.modules())

    config = ModelConfig(encoder=encoder, features="map", output_stride=None, head="linear")
    model = build_model(config, DENSE, image_size=(32, 32))
    assert in_place(model.encoder) > 0
    use_compute(model, ComputeConfig(checkpointing=True))
    assert in_place(model.encoder) == 0


def test_channels_last_reaches_the_representation() -> None:
    stepper, batch = small_stepper(ALONE, policy_config("EW")), dense_batch(0, ALONE)
    use_compute(stepper.model, ComputeConfig(channels_last=True))
    features = stepper.model.encoder(batch.images)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert not features.is_contiguous()


def test_an_encoder_that_offers_no_checkpointing_is_named() -> None:
    model = small_stepper(ALONE, policy_config("EW")).model
    with pytest.raises(
        ExperimentError, match=r"checkpointing is True, but the encoder \(Sequential\)"
    ):
        use_compute(model, ComputeConfig(checkpointing=True))


def test_parts_that_do_not_divide_are_explained() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 4 with compute.encoder_parts 3"):
        small_experiment(compute__encoder_parts=3)
    stepper = small_stepper(ALONE, policy_config("EW"))
    use_compute(stepper.model, ComputeConfig(encoder_parts=4))
    with pytest.raises(ExperimentError, match=r"encoder_parts is 4, but a worker's part .* 2 rows"):
        stepper.step(dense_batch(0, ALONE, size=2), global_step=0)


@pytest.mark.parametrize(
    ("field", "value"), [("compile", True), ("checkpointing", True), ("encoder_parts", 2)]
)
def test_a_representation_inside_the_encoder_needs_it_as_written(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"compute\.{field} is {value} with model.representation"):
        small_experiment(model__representation="encoder.blocks", **{f"compute__{field}": value})
    small_experiment(model__representation="encoder.blocks", compute__channels_last=True)


def test_an_encoder_of_several_inputs_is_computed_in_parts() -> None:
    class Towers(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left * right.sum()

    model = small_stepper(ALONE, policy_config("EW")).model
    model.encoder = Towers()
    use_compute(model, ComputeConfig(encoder_parts=2))
    found = model.encoder(left=torch.ones(4, 2), right=torch.arange(4.0))
    assert found[:, 0].tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize("way", [pytest.param("compile", marks=pytest.mark.slow), "encoder_parts"])
def test_two_workers_with_global_statistics_compute_as_one(
    way: str, pool_of: Callable[[int], Pool]
) -> None:
    if way == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    two = {"compute": ComputeConfig(**{way: True if way == "compile" else 2})}
    one = {} if way == "compile" else two
    expected = pool_of(1).run(parameters_after, policy_config("PCGrad"), one)[0]
    for found in pool_of(2).run(parameters_after, policy_config("PCGrad"), two):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
