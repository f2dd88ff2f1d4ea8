"""Wrong types and values for every public argument, found by introspection: one ValueError, or they are taken.

A new argument of a function, a new field of a configuration and a new option of a command are tried without a
change of this file. Nothing is trained: the functions that would are replaced by one that stops.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data

from repmtl_ray import (
    CustomData,
    Placement,
    RepMTL,
    benchmark,
    cli,
    cluster,
    csa_loss,
    fit,
    prepared_run,
    recommend,
    tune,
)
from repmtl_ray.cli import commands
from repmtl_ray.config import (
    ComputeConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RegularizerConfig,
    digest,
    from_dict,
    to_dict,
)
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.tasks import TASK_CLASSES, Depth
from tests.helpers.parameters import mostly_slow

NESTED: list[Any] = []
for _ in range(50):
    NESTED = [NESTED]

WRONG: dict[str, Any] = {
    "None": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "a huge integer": 10**400,
    "half": 0.5,
    "a huge float": 1e308,
    "nan": float("nan"),
    "infinite": float("-inf"),
    "complex": 1j,
    "empty": "",
    "a word": "word",
    "NUL": "a\0b",
    "a lone surrogate": "\ud800",
    "lines": "one\ntwo",
    "bytes": b"bytes",
    "a path": Path("nowhere/at/all"),
    "an empty list": [],
    "a list": [1, "two"],
    "deep": NESTED,
    "an empty mapping": {},
    "a mapping": {"a": 1},
    "a mapping by numbers": {1: 2},
    "a set": {1},
    "an array": np.zeros((2, 3)),
    "a scalar array": np.float32(0.5),
    "a class": Depth,
    "a task": Depth(name="depth"),
    "a function": len,
    "an object": object(),
}


class Reached(Exception):  # noqa: N818
    """Everything was accepted: from here on there would be work."""


def stop(*_: Any, **__: Any) -> Any:
    raise Reached


def outcome(call: Callable[[], Any]) -> BaseException | None:
    """What a call raised, if it is neither an error for users nor acceptance."""
    try:
        call()
    except (ValueError, Reached):
        return None
    except pytest.fail.Exception:  # the time limit of the test
        raise
    except BaseException as error:  # noqa: BLE001 -- whatever it is, the test reports it
        return error
    return None


def report(found: Mapping[str, BaseException | None], capsys: Any, what: str) -> None:
    """Fails with everything that was no ValueError; says how much was tried."""
    with capsys.disabled():
        print(f"{len(found)} inputs for {what}", flush=True)
    wrong = {name: repr(error)[:200] for name, error in found.items() if error is not None}
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong}"


class Rows(ray.data.Dataset):
    """Stands for rows that nobody reads."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


DATASET = Rows()
RIGHT: dict[Any, dict[str, Any]] = {
    DataConfig: {"name": "cityscapes"},
    ModelConfig: {},
    PolicyConfig: {},
    RegularizerConfig: {},
    OptimizerConfig: {},
    ComputeConfig: {},
    Experiment: {"data": DataConfig(name="cityscapes")},
    Placement: {},
    CheckpointConfig: {},
    CustomData: {
        "train": DATASET,
        "evaluation": DATASET,
        "tasks": (Depth(name="depth"), Depth(name="far")),
    },
    RepMTL: {"channel_axis": 1},
    **{
        cls: {
            "name": "a",
            **{
                number: 3
                for number in ("num_classes", "num_labels")
                if number in signature(cls).parameters
            },
        }
        for cls in TASK_CLASSES
    },
}


@pytest.mark.parametrize("cls", RIGHT, ids=lambda cls: cls.__name__)
def test_wrong_values_of_a_class(cls: Any, capsys: Any) -> None:
    found: dict[str, BaseException | None] = {}
    names = list(signature(cls).parameters)
    assert names
    for name in names:
        for label, value in WRONG.items():

            def made(name: str = name, value: Any = value) -> None:
                instance = cls(**{**RIGHT[cls], name: value})
                if cls in (Experiment, DataConfig, ModelConfig, PolicyConfig):
                    assert from_dict(cls, to_dict(instance)) == instance, "it is not read back"
                    digest(instance)

            found[f"{name} is {label}"] = outcome(made)
    found["a keyword that there is not"] = None
    with pytest.raises(TypeError):
        cls(**RIGHT[cls], no_such_argument=1)
    report(found, capsys, cls.__name__)


CUSTOM = Experiment(
    data=DataConfig(name="custom"), model=ModelConfig(encoder="test_efficientnet", head="linear")
)
SCENES = Experiment(
    data=DataConfig(name="cityscapes", height=32, width=64, num_train=64, num_val=2),
    model=ModelConfig(encoder="test_efficientnet", head="linear"),
    epochs=1,
)
FUNCTIONS: dict[Any, dict[str, Any]] = {
    fit: {"experiment": CUSTOM, "data": CustomData(**RIGHT[CustomData])},
    tune: {"experiment": SCENES, "param_space": {"regularizer.lambda_tsr": 0.5}},
    recommend: {"experiment": SCENES},
    benchmark: {"experiment": SCENES, "methods": {"EW": {"policy.name": "EW"}}},
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever comes after the checks of arguments stops the call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cluster, "connect", stop)
    monkeypatch.setattr(prepared_run, "open_data", stop)
    monkeypatch.setattr("repmtl_ray.studies.method_runs.open_split", stop)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_wrong_arguments_of_a_function(function: Any, capsys: Any) -> None:
    found: dict[str, BaseException | None] = {}
    for name in signature(function).parameters:
        for label, value in WRONG.items():
            arguments = {**FUNCTIONS[function], name: value}
            found[f"{name} is {label}"] = outcome(partial(function, **arguments))
    with pytest.raises(Reached):
        function(**FUNCTIONS[function])
    report(found, capsys, function.__name__)


POSITIONAL: dict[str, list[str]] = {
    "ablation": ["scenes"],
    "benchmark": ["scenes"],
    "recommend": ["scenes"],
    "sensitivity": ["scenes"],
    "timing": ["scenes"],
    "train": ["best.json"],
    "export": ["checkpoint", "--out", "model.safetensors"],
    "evaluate": ["checkpoint"],
    "predict": ["checkpoint", "photograph.png"],
    "pictures": ["checkpoint"],
    "powerlaw": ["checkpoint"],
    "inspect": ["store"],
    "report": ["results/search"],
    "prepare": ["cityscapes", "--out", "shards"],
    "tune office31": ["--data", "office"],
    "study": ["streets"],
    "plan": ["--epoch-seconds", "10"],
}
WORK = (
    "train.fit",
    "search.tune",
    "studies.benchmark.benchmark",
    "data.prepare.prepare",
    "studies.method_runs.open_split",
    "studies.timing.time_methods",
    "cli.commands.plan.simulate",
    "planning.timing.measure_epoch",
    "cli.commands.prepare.open_streams",
    "studies.rep_mtl.run_study",
    "runs.loop.run",
)
"""What commands call once their options are read."""
WRONG_TEXTS = [
    *("", " ", "word", "-1", "0", "1", "2.5", "1e999", "nan", "-inf", "9" * 400, "a\0b", "\udcff"),
    *(
        "nowhere/at/all",
        "/proc/no",
        "../..",
        "s3://",
        "what://ever",
        "file://",
        "a=b",
        "=",
        "[",
        "1:2",
    ),
    *(
        "epochs=0",
        "epochs=[",
        "data.name=3",
        "policy.arguments.c={}",
        "2:1",
        ":",
        "EW",
        "none",
        "é",
    ),
]


WITH_OPTIONS_OF_ANOTHER = ("ablation", "sensitivity", "tune office31")
"""Nearly all options of these are those of "benchmark" and of "tune cityscapes"."""


def run_command(command: str, arguments: list[str]) -> BaseException | None:
    """What went otherwise than: accepted, or one error line and exit code 2."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            cli.main(command, arguments)
    except Reached:
        return None
    except pytest.fail.Exception:  # the time limit of the test
        raise
    except SystemExit as end:
        text = shown.getvalue()
        if end.code == 2 and text.startswith("error: ") and text.count("\n") == 1:
            return None
        return AssertionError(f"exit code {end.code}, {text[:200]!r}")
    except BaseException as error:  # noqa: BLE001
        return error
    return None


@pytest.fixture
def stopped_commands(monkeypatch: pytest.MonkeyPatch, no_work: None) -> None:
    assert no_work is None
    monkeypatch.setattr(sys, "argv", ["repmtl-ray"])
    for path in WORK:
        module, _, name = path.rpartition(".")
        monkeypatch.setattr(importlib.import_module(f"repmtl_ray.{module}"), name, stop)
    Path("best.json").write_text(json.dumps(to_dict(SCENES)))


@pytest.mark.usefixtures("stopped_commands")
@pytest.mark.parametrize(
    "command", mostly_slow(commands.COMMANDS, {*commands.COMMANDS} - {*WITH_OPTIONS_OF_ANOTHER})
)
def test_wrong_options_of_a_command(command: str, capsys: Any) -> None:
    right = POSITIONAL.get(command, [])
    found: dict[str, BaseException | None] = {}
    actions = [action for action in cli.parser_of(command)._actions if action.dest != "help"]
    assert actions
    for action in actions:
        for text in WRONG_TEXTS:
            option = action.option_strings[-1:]
            given = [f"{option[0]}={text}"] if option and action.nargs != 0 else [*option, text]
            arguments = [*right, *given] if option else [text, *right[1:]]
            label = f"{action.dest} is {text[:20]!r}"
            found[label] = run_command(command, arguments)
    found["an option that there is not"] = run_command(command, [*right, "--no-such-option"])
    found["nothing"] = run_command(command, [])
    report(found, capsys, command)


def test_wrong_temperatures_of_the_pure_loss() -> None:
    import torch

    saliency = torch.rand(2, 2, 3, 4)
    for value in WRONG.values():
        assert outcome(partial(csa_loss, saliency, temperature=value)) is None
