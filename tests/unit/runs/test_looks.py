"""Second looks: parameters and batch-norm statistics are as if nobody had looked."""

from __future__ import annotations

import pytest
import torch

from repmtl_ray.collectives import ALONE
from tests.helpers.runs import dense_batch, policy_config, small_stepper


@pytest.mark.parametrize("name", ["SAMO", "F-MTL"])
def test_looks_leave_parameters_and_statistics_as_one_pass_does(name: str) -> None:
    states = []
    for policy in ("EW", name):
        stepper = small_stepper(ALONE, policy_config(policy), learning_rate=0.0)
        stepper.step(dense_batch(0, ALONE), global_step=0)
        assert all(module.training for module in stepper.model.modules())
        states.append(stepper.model.state_dict())
    assert any("running_mean" in key for key in states[0])
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
