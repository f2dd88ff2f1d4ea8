"""The experiment's description: round trip, overrides by path, and messages for every kind of
mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from repmtl_ray.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    PolicyConfig,
    RegularizerConfig,
    digest,
    from_dict,
    replace,
    to_dict,
)

BASE = Experiment(data=DataConfig(name="cityscapes"))


def test_round_trip_keeps_everything() -> None:
    experiment = Experiment(
        data=DataConfig(name="office31", path="/data", domains=("a", "b"), height=64, width=48),
        model=ModelConfig(encoder="resnet18", features="pooled", head="linear", bottleneck=8),
        policy=PolicyConfig(name="CAGrad", arguments={"c": 0.4}),
        tasks=("a", "b"),
    )
    assert from_dict(Experiment, to_dict(experiment)) == experiment
    assert digest(from_dict(Experiment, to_dict(experiment))) == digest(experiment)


def test_digest_follows_every_value() -> None:
    assert digest(BASE) == digest(Experiment(data=DataConfig(name="cityscapes")))
    assert digest(BASE) != digest(replace(BASE, {"regularizer.lambda_tsr": 0.91}))


def test_fields_that_came_later_change_no_digest_at_their_defaults() -> None:
    assert digest(BASE) == "f7c99f357868"  # of the version before form, columns and pairing
    assert digest(replace(BASE, {"data.path": "/data", "data.form": "npy"})) != digest(
        replace(BASE, {"data.path": "/data"})
    )


def test_what_depends_on_the_name_of_the_data_is_filled_in() -> None:
    home = DataConfig(name="office_home", path="/data")
    assert home.domains == ("Art", "Clipart", "Product", "Real_World")
    assert DataConfig(name="office_home", path="/data", domains=("Real World",)).domains == (
        "Real_World",
    )
    assert DataConfig(name="office31", path="/data").domains == ("amazon", "dslr", "webcam")
    assert (BASE.data.num_train, BASE.data.num_val) == (2975, 500)


def test_replace_reaches_any_depth_and_leaves_the_original() -> None:
    changed = replace(
        BASE,
        {
            "regularizer.lambda_tsr": 1,
            "policy.name": "CAGrad",
            "policy.arguments.c": 0.4,
            "epochs": 3,
            "tasks": ["depth"],
        },
    )
    assert changed.regularizer.lambda_tsr == 1.0
    assert changed.policy.arguments == {"c": 0.4}
    assert changed.tasks == ("depth",)
    assert Experiment(data=DataConfig(name="cityscapes")) == BASE
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policy.nam": "EW"}, "did you mean 'name'"),
        ({"regulariser.lambda_tsr": 1.0}, "did you mean 'regularizer'"),
        ({"epochs.more": 1}, "names no field"),
        (
            {"regularizer.lambda_tsr": -1.0},
            r"regularizer.lambda_tsr is -1.0; expected a finite number >= 0 and <= 1e\+38",
        ),
        (
            {"regularizer.lambda_csa": float("inf")},
            "lambda_csa is inf; expected a finite number >= 0",
        ),
        ({"regularizer.temperature": 0.0}, "temperature is 0.0; expected a finite number > 0"),
        ({"epochs": 0}, "epochs is 0; expected a finite number >= 1 and <="),
        ({"epochs": 2.5}, "epochs is 2.5; expected a value of type int"),
        ({"epochs": True}, "expected a value of type int"),
        ({"batch_size": 1}, "CSA contrasts samples and needs at least 2"),
        ({"data.name": "citiscapes"}, "did you mean 'cityscapes'"),
        ({"data.name": "office31"}, "data.path is None; expected the Office-31 folder"),
        ({"data.name": "office_home"}, "data.path is None; expected the Office-Home folder"),
        ({"data.height": 64}, "both or neither"),
        ({"data.num_train": 0}, "data.num_train is 0; expected a finite number >= 1"),
        ({"data.domains": []}, "expected at least one domain"),
        ({"data.form": "npy"}, "data.form is 'npy'; expected 'auto' without a data.path"),
        ({"data.form": "folders"}, "data.form is 'folders'; cityscapes is read as npy"),
        ({"data.columns.depth": "disparity"}, r"data.columns is \{'depth': 'disparity'\}"),
        (
            {"data.pairing": "class"},
            "expected 'position', except for office31, office_home, image_folders",
        ),
        ({"model.pretrained": True, "model.weights": "w.pth"}, "one of the two"),
        ({"model.features": "pooled"}, "features 'map' for an ASPP head"),
        ({"model.features": "maps"}, "one of 'map', 'pooled', 'tokens'"),
        ({"model.output_stride": 7}, "4, 8, 16, 32 or None"),
        ({"optimizer.name": "adamm"}, "one of 'adam', 'adamw', 'sgd'"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        ({"precision": "fp16"}, "one of 'float32', 'bfloat16', 'float16', 'float64'"),
        ({"tasks": []}, "names without repeats"),
    ],
)
def test_mistakes_get_one_message_each(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BASE, overrides)


LIMITS = {
    "seed": (0, 2**32 - 1),
    "epochs": (1, 1_000_000),
    "batch_size": (2, 1_000_000),
    "data.height": (8, 16_384),
    "data.num_train": (1, 10_000_000),
    "data.num_val": (1, 10_000_000),
    "data.scene_seed": (0, 2**32 - 1),
    "data.holdout_seed": (0, 2**32 - 1),
    "model.head_channels": (1, 65_536),
    "optimizer.halve_at_epoch": (1, 1_000_000),
    "regularizer.lambda_tsr": (0.0, 1e38),
    "regularizer.lambda_csa": (0.0, 1e38),
    "regularizer.temperature": (1e-38, 1e38),
    "regularizer.share": (1e-38, 1.0),
    "model.batch_norm_momentum": (1e-38, 1.0),
    "optimizer.learning_rate": (1e-38, 1e38),
    "optimizer.weight_decay": (0.0, 1e38),
    "optimizer.max_gradient_norm": (1e-38, 1e38),
}


def with_value(path: str, value: object) -> Experiment:
    overrides: dict[str, object] = {path: value}
    if path == "data.height":
        overrides["data.width"] = 64
    if path == "data.holdout_seed":
        overrides["data.holdout"] = 0.1
    return replace(BASE, overrides)


@pytest.mark.parametrize("path", LIMITS)
def test_every_number_has_limits_that_belong_to_its_range(path: str) -> None:
    minimum, maximum = LIMITS[path]
    for value in (minimum, maximum):
        with_value(path, value)
    outside: list[object] = [minimum - 1, 2 * maximum + 2, 10**400, True, "3"]
    if isinstance(minimum, float):
        outside += [float("nan"), float("inf"), -float("inf")]
    for wrong in outside:
        with pytest.raises(ValueError, match=path.split(".")[-1]):
            with_value(path, wrong)


def test_every_number_of_an_experiment_has_tested_limits() -> None:
    """A number that is added later needs limits too."""
    elsewhere = {"data.width", "data.holdout", "model.dropout", "model.output_stride"}
    elsewhere |= {"model.bottleneck", "optimizer.momentum", "compute.encoder_parts"}
    numbers = set()
    for part in dataclasses.fields(Experiment):
        value = getattr(BASE, part.name)
        if dataclasses.is_dataclass(value):
            for entry in dataclasses.fields(value):
                if {"int", "float"} & set(str(entry.type).split(" | ")):
                    numbers.add(f"{part.name}.{entry.name}")
        elif {"int", "float"} & set(str(part.type).split(" | ")):
            numbers.add(part.name)
    assert numbers - elsewhere == set(LIMITS)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.width", 7),
        ("data.holdout", float("nan")),
        ("data.holdout", 1.0),
        ("model.dropout", float("nan")),
        ("model.dropout", 1.0),
        ("model.atrous_rates", [0]),
        ("model.atrous_rates", [2**70]),
        ("model.bottleneck", 0),
        ("optimizer.momentum", float("nan")),
        ("optimizer.momentum", 1.0),
        ("compute.encoder_parts", 0),
    ],
)
def test_fractions_and_lists_have_limits_too(path: str, value: object) -> None:
    with pytest.raises(ValueError, match=path.split(".")[-1]):
        replace(BASE, {"data.height": 64, "data.width": 64, path: value})


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"regularizer.lamda_tsr is not a field of RegularizerConfig; did you mean 'lambda_tsr'",
    ):
        from_dict(Experiment, {"data": {"name": "cityscapes"}, "regularizer": {"lamda_tsr": 1}})
    with pytest.raises(ValueError, match="data is missing from Experiment"):
        from_dict(Experiment, {})


def test_active_says_whether_a_penalty_is_on() -> None:
    assert RegularizerConfig().active
    assert not RegularizerConfig(lambda_tsr=0, lambda_csa=0).active


def test_configuration_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, importlib.util, types\n"
        "package = types.ModuleType('repmtl_ray'); package.__path__ = ['repmtl_ray']\n"
        "sys.modules['repmtl_ray'] = package\n"
        "import repmtl_ray.config\n"
        "assert not {'torch', 'ray'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


OFFICE = {"data.name": "office31", "data.path": "/data", "model.output_stride": 8}
POOLED = {"model.features": "pooled", "model.head": "linear"}
UNUSED = [
    *(
        {"data.name": "custom", f"data.{field}": value}
        for field, value in {
            "path": "/data",
            "eval_split": "test",
            "holdout": 0.5,
            "num_train": 8,
            "num_val": 8,
            "scene_seed": 1,
            "domains": ["left"],
        }.items()
    ),
    {"data.name": "custom", "data.height": 32, "data.width": 64},
    {"data.name": "custom", "data.columns": {"depth": "metres"}},
    {"data.name": "custom", "data.pairing": "class"},
    {"data.path": "/data", "data.num_train": 8},
    {"data.path": "/data", "data.num_val": 8},
    {"data.path": "/data", "data.scene_seed": 2},
    {"data.domains": ["amazon", "dslr"]},
    {"data.holdout_seed": 1},
    {**OFFICE, "data.num_train": 8},
    {**OFFICE, "data.columns": {"image": "picture"}},
    {**POOLED, "model.output_stride": 16},
    {"model.head": "linear", "model.head_channels": 8},
    {"model.head": "linear", "model.atrous_rates": [1]},
    {"model.head": "linear", "model.dropout": 0.1},
    {"optimizer.momentum": 0.5},
]


@pytest.mark.parametrize("changes", UNUSED)
def test_a_setting_that_would_change_nothing_is_refused(changes: Any) -> None:
    with pytest.raises(ValueError, match=list(changes)[-1].split(".")[0] + r"\.") as caught:
        replace(BASE, changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.name": "custom", "data.augment": True},
        {"data.name": "nyuv2", "data.path": "/data"},
        {"data.name": "office31", "data.path": "/data", "data.pairing": "class"},
        {"data.num_train": 8, "data.num_val": 2, "data.scene_seed": 3},
        {"data.holdout": 0.1, "data.holdout_seed": 3},
        {**POOLED, "model.output_stride": None, "model.dropout": 0.0},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.5},
    ],
)
def test_settings_that_are_used_and_values_that_were_filled_in_are_taken(
    changes: dict[str, Any],
) -> None:
    experiment = replace(BASE, changes)
    assert from_dict(Experiment, to_dict(experiment)) == experiment


@pytest.mark.parametrize(
    "value",
    [{1: 2}, {"c": {1}}, {"c": float("inf")}, {"c": object()}, [("c", 1)]],
    ids=["key", "set", "infinite", "object", "pairs"],
)
def test_an_argument_that_json_has_not_is_refused(
    value: list[tuple[str, int]] | dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=r"policy\.arguments"):
        PolicyConfig(name="CAGrad", arguments=value)


def test_deep_and_huge_values_are_one_error() -> None:
    deep = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(ValueError, match="at most 8 levels"):
        PolicyConfig(name="CAGrad", arguments={"c": deep})
    with pytest.raises(ValueError, match="beyond the range"):
        RegularizerConfig(lambda_tsr=10**400)


def test_what_is_stored_and_read_back_is_what_was_given() -> None:
    given = PolicyConfig(name="Constant", arguments={"weights": (1, 2)})
    assert from_dict(PolicyConfig, to_dict(given)) == given
