"""The documents: their Python runs, their links and paths lead somewhere, their tables of options and
fields are complete."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from repmtl_ray import config
from repmtl_ray.cli import commands, console
from repmtl_ray.placement import Placement
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from tests.helpers.documents import options_of, options_of_command, run_notebook
from tests.helpers.paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDE = ROOT / "docs" / "guide.md"
NOT_RUN = re.compile(r"<!-- not run: needs (Ray|data|a GPU|several processes) -->\s*\Z")
PATH = re.compile(
    r"`((?:repmtl_ray|pipelines|search_spaces|tests|bench|docs|deploy|\.ci)/[\w./-]+"
    r"\.(?:py|md|yaml|json|csv|png))`"
)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Snippet(NamedTuple):
    document: Path
    line: int
    language: str
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{label(self.document)}:{self.line}"


def snippets(document: Path) -> list[Snippet]:
    """Every fenced block."""
    text = document.read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [
        Snippet(
            document,
            text[: match.start()].count("\n") + 1,
            match[1],
            match[2],
            runs=NOT_RUN.search(text[: match.start()]) is None,
        )
        for match in fence.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), f"{document}: fences"
    return found


SNIPPETS = [snippet for document in DOCUMENTS for snippet in snippets(document)]
PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]
SHELL = [snippet for snippet in SNIPPETS if snippet.language in ("bash", "console")]


@pytest.mark.parametrize("snippet", [s for s in PYTHON if s.runs], ids=str)
def test_python_runs(snippet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPMTL_RAY_CACHE", str(tmp_path / "cache"))
    lines = "\n" * snippet.line + snippet.code  # so that a traceback shows the document's line
    exec(compile(lines, str(snippet.document), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("snippet", [s for s in PYTHON if not s.runs], ids=str)
def test_python_that_is_not_run_is_python_and_imports_what_exists(snippet: Any) -> None:
    tree = ast.parse(snippet.code, str(snippet))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports, "a snippet that is not run must at least import what it uses"
    for node in imports:
        exec(compile(ast.Module([node], []), str(snippet), "exec"), {})


def test_the_notebook_of_an_own_loop_prints_what_it_shows(tmp_path: Path) -> None:
    texts = run_notebook(ROOT / "docs" / "notebooks" / "own_loop.ipynb")
    assert any(stored for stored, _ in texts)
    for stored, printed in texts:
        assert printed == stored


@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_relative_links_lead_somewhere(document: Any) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{label(document)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{label(document)} links to {target}"


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=label)
def test_paths_of_the_repository_exist(document: Any) -> None:
    for path in PATH.findall(document.read_text()):
        assert (ROOT / path).exists(), f"{label(document)} mentions {path}"


@pytest.mark.parametrize("snippet", SHELL, ids=str)
def test_commands_name_recipes_and_options_that_exist(snippet: Any) -> None:
    for line in snippet.code.replace("\\\n", " ").splitlines():
        command = line.partition(" #")[0]
        recipe = re.search(r"python (pipelines/\w+\.py)(.*)", command)
        if recipe:
            unknown = set(re.findall(r"(--[a-z][a-z-]+)", recipe[2])) - options_of(ROOT / recipe[1])
            assert not unknown, f"{snippet}: {recipe[1]} has no {sorted(unknown)}"
        typed = re.search(r"(?:python -m repmtl_ray|repmtl-ray)((?: [\w./=*-]+)*)", command)
        if typed and typed[1].split()[:1] not in ([], ["--help"], ["--version"]):
            name, words = console.split(typed[1].split())
            unknown = set(re.findall(r"(--[a-z][a-z-]+)", " ".join(words)))
            unknown -= options_of_command(name) | {"--help"}
            assert not unknown, f"{snippet}: {name} has no {sorted(unknown)}"
        module = re.search(r"python -m (bench[\w.]*)", command)
        if module:
            assert (ROOT / (module[1].replace(".", "/") + ".py")).exists(), f"{snippet}: {command}"
        target = re.match(r"make (\w+)", command)
        if target:
            assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(), f"{snippet}: {command}"


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_the_guide_explains_every_option(command: str) -> None:
    options = options_of_command(command)
    missing = {option for option in options if f"{option}`" not in GUIDE.read_text()} - {
        option for option in options if f"{option} " in GUIDE.read_text()
    }
    assert not missing


PARTS = [
    config.Experiment,
    config.DataConfig,
    config.ModelConfig,
    config.PolicyConfig,
    config.RegularizerConfig,
    config.OptimizerConfig,
    config.ComputeConfig,
    Placement,
    CheckpointConfig,
]


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`".replace("'", '"')
    if field.default_factory is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default_factory):
        return f"`{field.default_factory.__name__}()`"
    return f"`{field.default_factory()!r}`"


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_the_guide_has_every_field_with_its_default(cls: Any) -> None:
    section = GUIDE.read_text().split(f"\n**`{cls.__name__}`**", 1)[1].split("\n\n", 2)[1]
    rows = [row.split("|") for row in section.splitlines()[2:]]
    documented = {row[1].strip(" `"): row[2].strip() for row in rows}
    assert documented == {field.name: default_of(field) for field in dataclasses.fields(cls)}


def test_the_guide_lists_every_space() -> None:
    import search_spaces

    text = GUIDE.read_text()
    assert all(f"| `{name}` |" in text for name in search_spaces.__all__)


GLOSSARY = ROOT / "docs" / "glossary.md"


@pytest.mark.parametrize("name", re.findall(r"`(repmtl_ray\.[\w.]+)`", GLOSSARY.read_text()))
def test_the_glossary_names_code_that_exists(name: str) -> None:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        break
    for attribute in parts[length:]:
        fields = getattr(value, "__dataclass_fields__", {})
        assert attribute in fields or hasattr(value, attribute), f"{name} does not exist"
        value = getattr(value, attribute, None)


def test_the_glossary_explains_every_word_once() -> None:
    words = re.findall(r"^\| ([^|]+) \| [A-Z]", GLOSSARY.read_text(), re.MULTILINE)
    assert len(words) == len(set(words))
    for word in ("own", "replicated", "saliency", "representation", "policy", "plain loss"):
        assert word in words


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_every_question_about_the_architecture_is_answered_by_a_files_name_alone() -> None:
    answers = re.findall(r"^\| (.+\?) \| `([\w./]+)` \|$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert len(answers) >= 10
    for question, file in answers:
        assert (ROOT / file).is_file(), f"{question} {file} does not exist"


def test_the_figure_of_the_floors_is_what_its_script_draws(tmp_path: Path) -> None:
    script = tmp_path / "architecture.py"
    script.write_text((ROOT / "docs/images/architecture.py").read_text())
    runpy.run_path(str(script), run_name="__main__")
    drawn = script.with_suffix(".svg").read_text()
    assert drawn == (ROOT / "docs/images/architecture.svg").read_text()
    for name in re.findall(r">([\w/]+)(?: \(thin\))?</text>", drawn):
        if "/" in name or name in ("train", "config", "storage"):
            path = ROOT / "repmtl_ray" / name
            found = path.exists() or path.with_suffix(".py").exists() or (ROOT / name).exists()
            assert found, f"the figure names {name}"
