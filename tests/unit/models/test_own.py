"""Models of the user's own: what is right is built, and what is wrong is one error before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repmtl_ray.config import ModelConfig
from repmtl_ray.models.own import Model, build_own_model
from repmtl_ray.tasks import Binary, Depth, Regression, Task
from tests.helpers.problems import SHOP, TEXT, shop_model, shop_split, text_model, text_split

TASKS: tuple[Task, ...] = (Binary(name="a"), Regression(name="b", num_values=2))
CONFIG = ModelConfig(encoder="custom")
X = torch.zeros(2, 3)
NOT_A_HEAD: Any = 3


def heads(width: int = 4) -> dict[str, nn.Module]:
    return {"a": nn.Linear(width, 1), "b": nn.Linear(width, 2)}


def simple() -> Model:
    return Model(encoder=nn.Linear(3, 4), heads=heads())


def build(make: Callable[[], Any], inputs: Any = X, **options: Any) -> Any:
    return build_own_model(make, CONFIG, TASKS, inputs=inputs, **options)


def test_one_input_is_an_argument_and_several_are_named() -> None:
    assert build(simple)(torch.ones(5, 3))["b"].shape == (5, 2)
    shop = build_own_model(shop_model, CONFIG, SHOP, inputs=shop_split(range(4)).example_inputs())
    assert shop.representation_shape == (8,)
    assert shop.channel_axis == 1


def test_tokens_have_their_channels_last_and_heads_that_attend_are_differentiated_twice() -> None:
    text = build_own_model(text_model, CONFIG, TEXT, inputs=text_split(range(4)).example_inputs())
    assert text.channel_axis == 2
    assert text.representation_shape[1] == 8


def test_the_channel_axis_can_be_said() -> None:
    def make() -> Model:
        return Model(encoder=nn.Unflatten(1, (1, 3)), heads={}, channel_axis=1)

    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(-1, 2, 3)

    class Pool(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(6, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1))

    swapped = {"a": Pool(1), "b": Pool(2)}
    assert build(lambda: Model(encoder=Swap(), heads=swapped)).channel_axis == 2
    assert build(lambda: Model(encoder=Swap(), heads=swapped, channel_axis=1)).channel_axis == 1
    with pytest.raises(ValueError, match=r"channel_axis is 3, but .* shape \[B, 2, 3\]"):
        build(lambda: Model(encoder=Swap(), heads=swapped, channel_axis=3))
    assert make().channel_axis == 1


def test_a_head_of_a_task_that_is_not_trained_is_left_out() -> None:
    model = build_own_model(simple, CONFIG, TASKS[:1], inputs=X, penalized=False)
    assert list(model.heads) == ["a"]
    with pytest.raises(
        ValueError, match="a head for 'b', which is no task of the data; they have a"
    ):
        build_own_model(simple, CONFIG, TASKS[:1], inputs=X, known=["a"], penalized=False)


def test_a_representation_may_be_inside_the_encoder() -> None:
    def make() -> Model:
        encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        return Model(encoder=encoder, heads=heads())

    config = ModelConfig(encoder="custom", representation="encoder.1")
    assert build_own_model(make, config, TASKS, inputs=X).representation_shape == (5,)
    wrong = ModelConfig(encoder="custom", representation="encoder.7")
    with pytest.raises(ValueError, match=r"'encoder\.7', which names no module of the encoder"):
        build_own_model(make, wrong, TASKS, inputs=X)


def test_frozen_parts_are_allowed_as_long_as_something_is_trained() -> None:
    def partly() -> Model:
        encoder = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
        encoder[0].requires_grad_(False)
        return Model(encoder=encoder, heads=heads())

    def wholly() -> Model:
        return Model(encoder=nn.Linear(3, 4).requires_grad_(False), heads=heads())

    assert build(partly)
    with pytest.raises(ValueError, match="no parameter of the encoder requires grad"):
        build(wholly)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class OnlyOnce(nn.Module):
    """A head with a first derivative alone."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * ctx.saved_tensors[0] * cotangent

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.Square.apply(x))


class Refusing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"a batch of {len(x)}")


def failing() -> Model:
    return {}["encoder"]


def shared() -> Model:
    layer = nn.Linear(4, 4)
    own = {task: nn.Sequential(layer, head) for task, head in heads().items()}
    return Model(encoder=nn.Linear(3, 4), heads=own)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 4), r"model\(\) is .*expected a repmtl_ray.Model"),
        (
            lambda: Model(encoder=torch.relu, heads=heads()),
            r"Model\.encoder is .*torch\.nn\.Module",
        ),
        (lambda: Model(encoder=nn.Linear(3, 4), heads=[]), r"Model\.heads is \[\]"),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads={"a": NOT_A_HEAD}),
            r"Model\.heads\[.a.\] is 3",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads={"a": nn.Linear(4, 1)}),
            "there is no head for task 'b'; there are a",
        ),
        (shared, "'a' and the head of 'b' share the parameter '0.weight'.*belongs to the encoder"),
        (
            lambda: Model(encoder=nn.Embedding(9, 4, sparse=True), heads=heads()),
            "sparse embedding .*sparse=False",
        ),
        (
            failing,
            r"function that makes it failed: KeyError: 'encoder' \(test_own\.py, line .*failing",
        ),
        (
            lambda: Model(encoder=Refusing(3, 4), heads=heads()),
            r"encoder does not run .* ValueError: a batch of 2 \(test_own\.py, line .*forward\)",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads=heads() | {"a": Refusing(4, 1)}),
            r"head does not run .* ValueError: a batch of 2 \(test_own\.py, line .*forward\)",
        ),
        (
            lambda: Model(encoder=nn.Linear(5, 4), heads=heads()),
            r"the encoder does not run on an input of shape \(2, 3\)",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads=heads(7)),
            "a head does not run on the encoder's output",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads=heads() | {"b": nn.Linear(4, 3)}),
            r"head of 'b' gives a tensor of shape \(2, 3\) for 2 samples; expected \[2, 2\]",
        ),
        (
            lambda: Model(encoder=Detached(3, 4), heads=heads()),
            "the representation .* is detached from the encoder's parameters",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads=heads() | {"a": Detached(4, 1)}),
            "the prediction of 'a' has no graph",
        ),
        (
            lambda: Model(encoder=nn.Linear(3, 4), heads=heads() | {"a": OnlyOnce()}),
            "no second derivative",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(make)
    assert "\n" not in str(caught.value)


def test_a_map_task_needs_maps() -> None:
    with pytest.raises(ValueError, match=r"head of 'a' gives .*expected \[2, 1, H, W\]"):
        build_own_model(simple, CONFIG, (Depth(name="a"), TASKS[1]), inputs=X)


def test_without_penalties_no_second_derivative_is_asked_for() -> None:
    def make() -> Model:
        return Model(encoder=nn.Linear(3, 4), heads=heads() | {"a": OnlyOnce()})

    assert build(make, penalized=False)
