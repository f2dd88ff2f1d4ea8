"""The floors of CONTRIBUTING.md, and which libraries may be used where, read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "repmtl_ray"

FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        *("conversion", "config", "data_config", "policy_names", "collectives"),
        *("storage", "run_folder", "run_lock"),
        *("data.columns", "data.stream", "scenes.*"),
    ),
    1: (
        *("metrics", "tasks", "saliency", "regularizers", "delta", "protocols"),
        *("data.*", "models.*", "studies.methods"),
    ),
    2: ("policies.*",),
    3: ("runs.*", "report.*", "studies.*"),
    4: (
        "alike",
        "cluster",
        "placement_group_cleanup",
        "train",
        "runs.guard",
        "runs.relay",
        "runs.worker",
    ),
    5: ("search.*", "studies.benchmark"),
    6: ("cli.*", "planning.*"),
}
"""A module imports from its own floor and those below; a module's own entry goes before its
package's, which is of all that has none. `repmtl_ray` itself only hands out names."""

RAY = {
    "alike",
    "cli.interruption",
    "cluster",
    "data.blocks",
    "data.cache",
    "data.custom",
    "data.prepare",
    "placement_group_cleanup",
    "runs.guard",
    "runs.relay",
    "runs.worker",
    "search",
    "search.asha",
    "search.baseline",
    "search.progress",
    "search.space",
    "search.trial",
    "studies.benchmark",
    "train",
}
LONGEST = 400
LOOKED_AT: dict[str, int] = {}
"""Longer ones that somebody looked at again and left whole: lines that each may have."""


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = modules()
NAMES = sorted(MODULES.keys() - {""})


def imports(name: str) -> Iterator[str]:
    """Every module that this one imports anywhere: at its top, in a function, for types alone; also
    by the name in `import_module("...")`."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno} is a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("import_module", "__import__"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def packages_of(name: str) -> set[str]:
    """Those that a module lies in, which Python loads before it."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def own_imports(name: str) -> set[str]:
    """Those of this package, by their short names, with the packages that they lie in."""
    found, around = set(), set()
    for imported in imports(name):
        if imported.startswith("repmtl_ray."):
            short = imported.removeprefix("repmtl_ray.")
            while short and short not in MODULES:
                short = short.rpartition(".")[0]
            found.add(short)
            around |= packages_of(short)
    return (found | around - packages_of(name)) - {"", name}


def floor_of(name: str) -> int:
    for entry in (name, f"{name.partition('.')[0]}.*"):
        for floor, names in FLOORS.items():
            if entry in names:
                return floor
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS in {Path(__file__).name}")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_imports_upwards(name):
    upwards = {other for other in own_imports(name) if floor_of(other) > floor_of(name)}
    assert not upwards, f"{name} (floor {floor_of(name)}) imports {sorted(upwards)}"


def test_no_import_goes_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(own_imports(name)):
                visit(other, (*path, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())


def users_of(library: str) -> set[str]:
    return {
        name
        for name in NAMES
        if any(found == library or found.startswith(f"{library}.") for found in imports(name))
    }


def test_ray_is_used_where_runs_are_placed_and_samples_cached_and_nowhere_else():
    assert users_of("ray") == RAY


def test_ray_train_tune_and_data_have_one_user_each():
    assert users_of("ray.train") == {"runs.guard", "runs.relay", "runs.worker", "train"}
    assert users_of("ray.tune") == {
        *(name for name in NAMES if name == "search" or name.startswith("search.")),
        *("runs.relay", "studies.benchmark"),
    }
    assert users_of("ray.data") == {"data.blocks", "data.cache", "data.custom"}


def test_only_policies_use_torchjd():
    users = users_of("torchjd")
    assert users
    assert all(name.startswith("policies.") for name in users), users


def test_only_collectives_talk_to_other_processes():
    assert users_of("torch.distributed") == {"collectives"}


def test_only_encoders_and_batch_norm_know_timm():
    assert users_of("timm") == {"models.encoders", "models.batch_norm"}


def test_configuration_and_storage_load_neither_torch_nor_ray():
    for name in ("config", "policy_names", "storage"):
        assert name not in users_of("torch") | users_of("ray")


def test_an_epoch_runs_without_ray():
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


@pytest.mark.parametrize("name", NAMES)
def test_modules_say_what_they_own_and_stay_short(name):
    module = MODULES[name]
    assert ast.get_docstring(module), f"{name} has no docstring"
    path = PACKAGE.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= LOOKED_AT.get(name, LONGEST), f"{name} has {num_lines} lines: split it"


SOURCES = sorted(
    path
    for folder in ("repmtl_ray", "pipelines", "search_spaces", "bench")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_hides_errors_or_runs_what_it_reads(path):
    problems = [
        f"line {node.lineno}: {problem}"
        for node in ast.walk(ast.parse(path.read_text()))
        if (problem := _problem(node))
    ]
    assert not problems, "; ".join(problems)


def _problem(node: ast.AST) -> str:
    if isinstance(node, ast.ExceptHandler):
        return "" if node.type else "bare except"
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if options.get("allow_pickle", "False") != "False" and called.endswith("load"):
        return "loads pickled arrays, which can run code"
    if called == "torch.load" and options.get("weights_only") != "True":
        return "torch.load without weights_only=True, which can run code"
    if called in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec"):
        return f"{called} can run code"
    return ""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("np.load(f, allow_pickle=True)", "pickled arrays"),
        ("torch.load(f)", "weights_only"),
        ("torch.load(f, weights_only=False)", "weights_only"),
        ("pickle.loads(b)", "can run code"),
        ("np.load(f, allow_pickle=False)", ""),
        ("torch.load(f, weights_only=True)", ""),
    ],
)
def test_problems_are_found(source, problem):
    found = "".join(_problem(node) for node in ast.walk(ast.parse(source)))
    assert problem in found
    assert bool(problem) == bool(found)
