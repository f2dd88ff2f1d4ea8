"""Policies of the user's own: wherever a name goes, in checkpoints, on workers, and refused."""

from __future__ import annotations

import functools
import importlib.util
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from ray import cloudpickle, tune
from torch import Tensor

from repmtl_ray import inference, policies
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import Experiment, PolicyConfig, digest, from_dict, replace, to_dict
from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs
from repmtl_ray.policies.fairgrad import FairGrad
from repmtl_ray.policies.gramian import GramianPolicy
from repmtl_ray.runs import loop
from repmtl_ray.search.space import own_names, with_names
from tests.helpers.gloo import Pool
from tests.helpers.own_policies import OneLength, SlowestFirst
from tests.helpers.problems import SHOP, own_experiment, shop_model, shop_split
from tests.helpers.training import SaveAt

OWN = [SlowestFirst, OneLength]


def train(workers: Workers, experiment: Experiment, **options: Any) -> Any:
    torch.set_num_threads(1)
    splits = {"train": shop_split(range(24)), "evaluation": shop_split(range(100, 113))}
    return loop.run(experiment, **splits, workers=workers, **options)


def history(workers: Workers, experiment: Experiment) -> list[dict[str, float]]:
    return train(workers, experiment)[1].history


def experiment_with(policy: type, **arguments: Any) -> Experiment:
    return own_experiment(policy=PolicyConfig(name=policy, arguments=arguments))


@pytest.mark.parametrize("policy", OWN)
def test_two_workers_find_what_one_finds(policy: type, pool_of: Callable[[int], Pool]) -> None:
    experiment = replace(experiment_with(policy), {"epochs": 1})
    alone = history(ALONE, experiment)
    assert alone != history(ALONE, own_experiment(epochs=1))
    for of_worker in pool_of(2).run(history, experiment):
        for one, two in zip(alone, of_worker, strict=True):
            assert two == pytest.approx(one, rel=1e-7, abs=1e-9)


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    experiment = experiment_with(SlowestFirst)
    place, last = tmp_path / "inside", tmp_path / "last"
    whole, progress = train(
        ALONE,
        experiment,
        checkpoints=SaveAt({4: place}),
        report=lambda metrics, snapshot: snapshot.save(last) if metrics["epoch"] == 2 else None,
    )
    again, resumed = train(ALONE, experiment, resume_from=place)
    assert resumed.history == progress.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert str(again.policy.state_dict()) == str(whole.policy.state_dict())
    inference.load_model(last, model=shop_model)  # needs no policy
    with pytest.raises(ValueError, match=r"policy\.name was 'SlowestFirst@"):
        train(ALONE, replace(experiment, {"policy.name": "EW"}), resume_from=place)


def test_the_class_goes_wherever_the_name_goes() -> None:
    experiment = experiment_with(SlowestFirst, decay=0.25)
    others = [
        replace(own_experiment(), {"policy.name": SlowestFirst, "policy.arguments.decay": 0.25}),
        replace(experiment, {"seed": 3, "policy": experiment.policy}),
        pickle.loads(pickle.dumps(experiment)),
    ]
    for other in others:
        assert other.policy == experiment.policy
        assert isinstance(policies.build(other.policy, ["a", "b"]), SlowestFirst)
    assert policies.build(SlowestFirst, num_tasks=2, decay=0.25).decay == 0.25  # type: ignore[attr-defined]
    assert PolicyConfig(name=FairGrad) == PolicyConfig(name="FairGrad")


def test_a_search_space_and_methods_may_hold_it() -> None:
    space = with_names(
        {
            "policy.name": tune.choice(["EW", SlowestFirst]),
            "policy": tune.grid_search([{"name": OneLength}, {"name": "UW"}]),
            "seed": tune.randint(0, 9),
        }
    )
    names = own_names(space)
    assert [name.partition("@")[0] for name in names] == ["SlowestFirst", "OneLength"]
    assert space["policy.name"].sample() in ("EW", names[0])
    assert with_names({"Mine": {"policy.name": OneLength}})["Mine"]["policy.name"] == names[1]


def test_what_was_stored_has_the_codes_identity_and_asks_for_the_class() -> None:
    experiment = experiment_with(SlowestFirst)
    stored = from_dict(Experiment, to_dict(experiment))
    assert stored == experiment
    assert digest(stored) == digest(experiment) != digest(own_experiment())
    with pytest.raises(ValueError, match=r"'SlowestFirst@.*whose code is in no file; hand over"):
        loop.selected_tasks(stored, SHOP)


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from repmtl_ray.policies.arguments import Positive
from repmtl_ray.policies.base import LossPolicy, StepInputs

@dataclass(kw_only=True, eq=False)
class Tilted(LossPolicy):
    power: Positive = 1.0
    name = "Tilted"

    def loss_weights(self, inputs: StepInputs):
        return inputs.losses**self.power{change}
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Any]:
    names: list[str] = []

    def from_source(change: str) -> Any:
        name = f"users_policies_{len(names)}"
        path = tmp_path / f"{name}.py"
        path.write_text(SOURCE.format(change=change))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield from_source
    for name in names:
        sys.modules.pop(name, None)


def test_the_identity_is_of_the_code(load: Any) -> None:
    first, same, other = (PolicyConfig(name=load(c).Tilted) for c in ("", "  # the same", " + 1"))
    assert first == same
    assert first.name.partition("@")[0] == other.name.partition("@")[0] == "Tilted"
    assert first != other


def test_it_is_made_where_nobody_has_its_module(load: Any, pool_of: Callable[[int], Pool]) -> None:
    module = load("")
    experiment = experiment_with(module.Tilted, power=2)
    cloudpickle.register_pickle_by_value(module)
    sent = cloudpickle.dumps(experiment)
    cloudpickle.unregister_pickle_by_value(module)
    for name, combined in pool_of(2).run(combined_there, sent):
        assert name == experiment.policy.name
        assert combined == [16.0, 81.0]


def combined_there(workers: Workers, sent: bytes) -> tuple[str, list[float]]:
    """What a policy makes of two unit gradients in another process."""
    experiment = pickle.loads(sent)
    policy = policies.build(experiment.policy, ["a", "b"])
    return str(experiment.policy.name), policy.combine(
        torch.eye(2), torch.tensor([4.0, 9.0])
    ).tolist()


class NoPolicy:
    name = "NoPolicy"


class Nameless(LossPolicy):
    def loss_weights(self, inputs: StepInputs) -> Tensor:
        return inputs.losses


class Unfinished(GramianPolicy):
    name = "Unfinished"


class Undecorated(Nameless):
    strength: Positive = 1.0
    name = "Undecorated"


@dataclass(kw_only=True, eq=False)
class Unruled(Nameless):
    strength: float = 1.0
    name = "Unruled"


@dataclass(kw_only=True, eq=False)
class Forgetful(Nameless):
    average: Tensor | None = field(default=None, init=False)
    name = "Forgetful"
    state_names = ("average", "moment")


class Closed(Nameless):
    name = "Closed"
    state_names = ("function",)
    function = print


class OfItsOwn(Nameless):
    name = "OfItsOwn"

    def __init__(self, strength: float) -> None:
        self.strength = strength


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (NoPolicy, "class NoPolicy, which is no policy; derive it from LossPolicy or Policy"),
        (Nameless, r"class Nameless, whose attribute `name` is None; .*name = \"Nameless\""),
        (Unfinished, r"does not define gramian_weights\(\); docs/own_policy\.md"),
        (Undecorated, r"'strength' cannot be set; decorate the class Undecorated with @dataclass"),
        (Unruled, r"argument 'strength' has the annotation .*which says no rule; .*Positive"),
        (Forgetful, r"state_names have 'moment'.*no such attribute; set it in __post_init__"),
        (Closed, r"state 'function' is <built-in.*a checkpoint holds tensors"),
        (OfItsOwn, r"which cannot be made \(TypeError.*`tasks`, `seed` and its arguments"),
        (7, r"policy\.name is 7; expected the name of a policy, or a class of your own"),
    ],
)
def test_a_class_that_cannot_train_is_refused_before_training(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.selected_tasks(experiment_with(policy), SHOP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decai": 0.5}, r"policy\.arguments\.decai is 0\.5.*did you mean 'decay'\?"),
        ({"decay": 2}, r"policy\.arguments\.decay of policy 'SlowestFirst' is 2; expected .* < 1"),
    ],
)
def test_arguments_follow_the_rules_of_the_class(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.selected_tasks(experiment_with(SlowestFirst, **arguments), SHOP)


def test_an_instance_and_a_partial_stand_for_their_class_and_arguments() -> None:
    expected = PolicyConfig(name=SlowestFirst, arguments={"decay": 0.25})
    instance = policies.build(SlowestFirst, num_tasks=3, seed=7, decay=0.25)
    for given in (instance, functools.partial(SlowestFirst, decay=0.25)):
        assert PolicyConfig(name=given) == expected
        space = with_names({"policy.name": tune.grid_search([SlowestFirst, given])})
        names = own_names(pickle.loads(pickle.dumps(space)))
        assert len(set(names)) == 2
        assert (
            replace(own_experiment(), {"policy.name": names[1]}).policy
            == replace(own_experiment(), {"policy": expected}).policy
        )
    assert PolicyConfig(name=instance, arguments={"decay": 0.5}).arguments == {"decay": 0.5}
    assert isinstance(PolicyConfig(name=policies.build(OneLength, num_tasks=2)).name, str)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: functools.partial(FairGrad, alpha=2.0), r"PolicyConfig\(name='FairGrad', arg"),
        (
            lambda: functools.partial(cast(Any, SlowestFirst), ("a", "b")),
            "expected the name of a policy",
        ),
        (lambda: 3, "policy.name is 3; expected the name of a policy, or a class of your own"),
    ],
)
def test_what_stands_for_no_policy_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(name=make())


def test_an_instance_that_was_used_is_refused_because_every_run_makes_its_own() -> None:
    policy = policies.build(SlowestFirst, num_tasks=2)
    policy.combine(torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match="SlowestFirst that has made steps"):
        PolicyConfig(name=policy)
