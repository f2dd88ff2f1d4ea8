"""Models of one's own on the samples that they are the likeliest to fail on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repmtl_ray.models.own import Model, stored_own_model
from repmtl_ray.runs.sample_check import _check
from tests.helpers.problems import NUM_USERS, SHOP, Towers, shop_model

NAMES = ("sample 7 of the training rows", "sample 8 of the training rows, with the largest value")


def inputs(user: int, price: float = 0.5) -> dict[str, Tensor]:
    users, prices = torch.tensor([0, user]), torch.tensor([0.5, price])
    return {"user": users, "item": torch.zeros(2, dtype=torch.int64), "price": prices}


def test_the_sample_that_a_model_fails_on_is_named() -> None:
    model = stored_own_model(shop_model, SHOP).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _check(model, inputs(NUM_USERS - 1), NAMES)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(
        ValueError,
        match=r"^model: it fails on sample 8 of .* largest value: IndexError: .* in forward\)\.$",
    ):
        _check(model, inputs(NUM_USERS), NAMES)


def test_a_prediction_that_is_no_number_is_found_before_training() -> None:
    class Roots(Towers):
        def forward(self, user: Tensor, item: Tensor, price: Tensor) -> Tensor:
            return super().forward(user, item, price.sqrt())

    def roots() -> Model:
        return Model(encoder=Roots(), heads={task.name: nn.Linear(8, 1) for task in SHOP})

    model = stored_own_model(roots, SHOP)
    _check(model, inputs(1), NAMES)
    with pytest.raises(ValueError, match="prediction of 'click' is not finite for sample 8 of"):
        _check(model, inputs(1, price=-1.0), NAMES)
