"""What an environment without some extras can do, and what it says of the rest."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import requires
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from repmtl_ray import cli, extras, policies
from repmtl_ray.cli import commands
from tests.helpers.paths import ROOT
from tests.unit.test_repository import EXTRAS, declared, installed_modules

USE_SOLVERS = (
    "CAGrad",
    "DualProj",
    "FORUM",
    "FairGrad",
    "GO4Align",
    "MOML",
    "Nash-MTL",
    "PIVRG",
    "UPGrad",
)
AROUND_FAIRGRAD = ("ConsMTL", "F-MTL", "SAMO")
"""Policies whose base is FairGrad by default."""


@pytest.fixture(scope="module")
def core_alone() -> list[str]:
    """The lines of `tests.helpers.core_alone`."""
    command = [sys.executable, "-m", "tests.helpers.core_alone"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_penalties_policies_and_steps_work_without_any_extra(core_alone: list[str]) -> None:
    combining = {line.split()[0] for line in core_alone if line.endswith(" combines")}
    without = {line for line in core_alone if line.endswith(" steps")}
    assert len(without) == 6
    assert {"Aligned-MTL", "ConFIG", "FAMO", "GradVac", "MGDA", "PCGrad", "UW"} <= combining
    said = {
        name: line for line in core_alone for name in re.findall(r"policy '([\w-]+)' needs", line)
    }
    assert set(said) == {*USE_SOLVERS}
    assert all('pip install "repmtl_ray[solvers]"' in line for line in said.values())
    unknown = set(policies.names()) - combining - {*USE_SOLVERS, *AROUND_FAIRGRAD}
    assert all(not policies.class_of(name).libraries for name in unknown)
    assert any("tune office31" in line for line in core_alone), "the help of the command"


def test_public_names_that_need_an_extra_say_which(core_alone: list[str]) -> None:
    said = dict(
        match.groups()
        for line in core_alone
        if (match := re.match(r'repmtl_ray\.(\w+) needs .*install "repmtl_ray\[(\w+)\]"', line))
    )
    ray = (
        *("CustomData", "StreamedRows", "Placement", "SearchResult"),
        *("tune", "benchmark", "FitResult", "fit"),
    )
    vision = ("TrainedModel", "evaluate", "load_model", "predict", "CheckpointConfig", "recommend")
    assert said == dict.fromkeys(ray, "ray") | dict.fromkeys(vision, "vision")


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the modules of some extras look absent."""
    find_spec = importlib.util.find_spec

    def lack(*names: str) -> None:
        absent = {module for name in names for module in extras.MODULES[name]}
        monkeypatch.setattr(
            extras.importlib.util,
            "find_spec",
            lambda name, package=None: None if name in absent else find_spec(name, package),
        )

    return lack


@pytest.mark.parametrize(
    ("command", "absent", "named"),
    [
        ("tune cityscapes", ["ray"], "ray,report"),  # pandas belongs to both
        ("train", ["ray", "report"], "ray,report"),
        ("benchmark", ["vision"], "ray,report"),  # Pillow belongs to both
        ("prepare", ["ray"], "ray"),
        ("recommend", ["solvers"], "report,solvers"),  # SciPy belongs to both
        ("evaluate", ["vision"], "vision"),
        ("predict", ["report"], "vision,report"),
        ("powerlaw", ["analysis"], "analysis"),
        ("export", ["vision"], "vision"),
    ],
)
def test_a_command_names_the_extras_it_lacks_in_one_line(
    command: str, absent: list[str], named: str, lacking: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking(*absent)
    with pytest.raises(SystemExit) as ended:
        cli.main(command, ["anything"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the command {command!r} needs ")
    assert line.endswith(f'; pip install "repmtl_ray[{named}]".')


def test_commands_that_use_a_trained_model_need_no_ray() -> None:
    for command in commands.COMMANDS:
        needed = commands.extras_of(command)
        assert needed
        assert set(needed) <= set(EXTRAS)
    for command in commands.GROUPS["use what was trained"]:
        assert "ray" not in commands.extras_of(command)


def test_a_missing_library_is_an_import_error_and_a_users_mistake(lacking: Any) -> None:
    lacking("solvers")
    with pytest.raises(ImportError, match=r"policy 'CAGrad' needs cvxpy, .*\[solvers\]"):
        policies.build("CAGrad", num_tasks=2)
    with pytest.raises(ValueError, match=r"policy 'PIVRG' needs scipy"):
        policies.build("PIVRG", num_tasks=2, single_task_losses=0.5)
    assert "CAGrad" not in policies.ready(2)


@pytest.mark.parametrize("extra", extras.MODULES)
def test_the_modules_of_an_extra_are_brought_by_what_it_declares(extra: str) -> None:
    of_torchjd = [Requirement(text) for text in requires("torchjd") or ()]
    full = [one for one in of_torchjd if one.marker and one.marker.evaluate({"extra": "full"})]
    brought = declared(extra) | {canonicalize_name(one.name) for one in full}
    installed = installed_modules()
    for module in extras.MODULES[extra]:
        distributions = {canonicalize_name(name) for name in installed.get(module, [module])}
        assert distributions & brought, f"extra {extra} does not install {module}"
