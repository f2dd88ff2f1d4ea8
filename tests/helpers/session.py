"""The recorded session of docs/session.md: its commands run in order, and what they printed.

The document is the list of commands: the lines that begin with "$ " in its console blocks, and its
Python blocks. They run in an empty home folder, whose subfolder `repmtl_ray` is a copy of this clone.
`pip install` puts a copy of the package beside it, without dependencies and without a network. Standard
output alone is recorded.

    python -m tests.helpers.session      records the document and its pictures again
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.paths import ROOT

DOCUMENT = ROOT / "docs" / "session.md"
PICTURES = {
    "session_pictures.png": "pictures/predictions.png",
    "session_panel.png": "predictions/street.panel.png",
}
"""By name in docs/images, what a command of the session made."""
CLONE = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "repmtl_ray", "search_spaces")
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*(?<!\\)(?:\\\n.*(?<!\\))*)\n", re.MULTILINE)


def record(text: str, home: Path) -> str:
    """The text with what its commands print now.

    A line that differs from the recorded one in measured times, rates and names of checkpoints alone
    stays as it was recorded.

    Args:
        text: of the document.
        home: an empty folder.

    Raises:
        AssertionError: a command ended with another exit code than 0.
    """
    clone = home / "repmtl_ray"
    clone.mkdir()
    for name in CLONE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)

    def run_again(block: re.Match[str]) -> str:
        if block[1] == "python":
            _run([sys.executable, "-c", block[2]], home)
            return block[0]
        recorded = {_stable(line): line for line in block[2].splitlines()}
        lines = []
        for command in COMMAND.findall(block[2]):
            printed = (
                _run(["bash", "-o", "pipefail", "-c", command], home)
                .replace(str(home), "~")
                .splitlines()
            )
            lines += [f"$ {command}", *(recorded.get(_stable(line), line) for line in printed)]
        return "\n".join(["```console", *map(str.rstrip, lines), "```"])

    return BLOCK.sub(run_again, text)


def words_of(text: str) -> set[str]:
    """The words that the commands of a document printed."""
    printed = [COMMAND.sub("", block[2]) for block in BLOCK.finditer(text) if block[1] == "console"]
    return set(re.findall(r"[a-z_]{3,}", " ".join(printed).lower()))


def _run(command: list[str], home: Path) -> str:
    installed = home / "installed"
    path = [str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(installed),
        "RAY_ADDRESS": "local",  # never the cluster of somebody else
        "PIP_TARGET": str(installed),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round: no isolation
    }
    done = subprocess.run(
        command,
        cwd=home / "repmtl_ray",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def _stable(line: str) -> str:
    """A line without what another run of the same commands on the same machine may change."""
    measured = r"\[ *\d+ s\]|\d+ s left|took \d+ s|[\d.]+ samples/s|\d+ % waiting"
    return re.sub(rf"{measured}|(?<=_)[0-9a-f]{{8}}\b", "#", line).rstrip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENT.write_text(record(DOCUMENT.read_text(), Path(folder)))
        for name, made in PICTURES.items():
            shutil.copy(Path(folder) / "repmtl_ray" / made, ROOT / "docs" / "images" / name)
