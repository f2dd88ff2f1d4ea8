"""What import-linter and ruff cannot say of the sources: who uses which part of a library, how long
files are, and what may not be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "repmtl_ray"
MAX_NUM_LINES = 400
USERS = {
    "ray.data": {"data"},
    "ray.train": {"ray_compat", "runs", "train"},
    "ray.tune": {"ray_compat", "runs", "search", "studies"},
    "torch.distributed": {"collectives"},
}
"""By part of a library, the packages and modules that use it. import-linter knows libraries only
whole."""


def files_below(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(module: ast.Module) -> Iterator[str]:
    """Every name that is imported anywhere: at the top, in a function, for types alone."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users_of(library: str) -> set[str]:
    """The packages and modules right below `repmtl_ray` that import a library or a part of it."""
    return {
        path.relative_to(PACKAGE).with_suffix("").parts[0]
        for path in files_below("repmtl_ray")
        if any(
            name == library or name.startswith(f"{library}.") for name in imports_of(parsed(path))
        )
    }


@pytest.mark.parametrize("library", USERS)
def test_a_part_of_a_library_is_used_in_its_place_and_nowhere_else(library: str) -> None:
    assert users_of(library) == USERS[library]


def test_an_epoch_runs_without_ray() -> None:
    """`runs.loop` and all it imports: mathematics, models, policies, data from files."""
    program = (
        "import sys\n"
        "sys.modules['ray'] = None\n"  # any `import ray` is now an ImportError
        "import repmtl_ray.runs.loop, repmtl_ray.report.table, repmtl_ray.report.heatmap\n"
        "from repmtl_ray import RepMTL, csa_loss, delta_p, policies, task_saliency, tsr_loss\n"
        "policies.names()\n"
        "assert not [name for name in sys.modules if name.startswith('ray.')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_modules_say_what_they_own_and_stay_short() -> None:
    for path in files_below("repmtl_ray"):
        assert ast.get_docstring(parsed(path)), f"{path} has no docstring"
        num_lines = len(path.read_text().splitlines())
        assert num_lines <= MAX_NUM_LINES, f"{path} has {num_lines} lines: split it"


def test_nothing_that_is_read_can_run_code() -> None:
    problems = [
        f"{path}:{node.lineno}: {problem}"
        for path in files_below("repmtl_ray", "pipelines", "search_spaces", "bench")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and (problem := loading_problem(node))
    ]
    assert not problems


def loading_problem(call: ast.Call) -> str:
    """What ruff does not find: its rules know `pickle`, `yaml`, `eval` and `exec`."""
    called = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called.endswith("load") and options.get("allow_pickle", "False") != "False":
        return "loads pickled arrays, which can run code"
    if called == "torch.load" and options.get("weights_only") != "True":
        return "torch.load without weights_only=True, which can run code"
    return ""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("np.load(f, allow_pickle=True)", "pickled arrays"),
        ("torch.load(f)", "weights_only"),
        ("torch.load(f, weights_only=False)", "weights_only"),
        ("np.load(f, allow_pickle=False)", ""),
        ("torch.load(f, weights_only=True)", ""),
    ],
)
def test_loading_that_can_run_code_is_found(source: str, problem: str) -> None:
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call)
    found = loading_problem(call)
    assert problem in found
    assert bool(problem) == bool(found)
