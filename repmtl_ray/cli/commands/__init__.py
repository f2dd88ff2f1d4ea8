"""The commands by name: one module each, with its docstring as help, `add_options` and `run`.

Owns which commands there are, and in what groups they are listed.
"""

from __future__ import annotations

import importlib
from types import ModuleType

GROUPS: dict[str, dict[str, str]] = {
    "train and compare": {
        "tune cityscapes": "search coefficients, temperature and policy on street images",
        "tune office31": "the same on Office-31 or Office-Home",
        "train": "train one experiment from its file, as a search leaves it",
        "recommend": "which method for this problem, within a budget",
        "benchmark": "methods over seeds by one published protocol",
        "ablation": "log losses x TSR x CSA, eight cells",
        "sensitivity": "how Rep-MTL depends on its coefficients and the learning rate",
        "study": "EW-log, Rep-MTL, and controls that could prove it wrong",
        "diagnose": "what Rep-MTL's penalties do to a small run",
        "timing": "time per epoch as a ratio to equal weights",
        "report": "tables, pictures and page of a search or benchmark, again",
    },
    "data and cluster": {
        "prepare": "check a data set, and convert it to shards",
        "inspect": "what a shard store holds, as a table and a picture",
        "plan": "machines, hours and cost of a search, before it is paid for",
    },
    "use what was trained": {
        "evaluate": "the metrics of a checkpoint on a split, as a table or JSON",
        "predict": "every task's prediction for photographs, as files",
        "pictures": "predictions, saliency and affinities of a checkpoint",
        "powerlaw": "power-law exponents of a checkpoint's layers",
        "export": "the model as safetensors, torch.export, ONNX or a Hub folder",
    },
}
_EXTRAS = {
    "prepare": ("ray",),
    "recommend": ("vision", "report", "solvers"),
    "study": ("vision", "report"),
    "diagnose": ("vision", "report"),
    "timing": ("vision", "report"),
    "inspect": ("vision", "report"),
    "plan": ("vision", "report"),
    "evaluate": ("vision",),
    "predict": ("vision", "report"),
    "pictures": ("vision", "report"),
    "powerlaw": ("vision", "analysis"),
    "export": ("vision",),
}
"""By command, the extras without which it cannot do anything, if not Ray and the report's."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


def module(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"{__name__}.{command.replace(' ', '_')}")


def extras_of(command: str) -> tuple[str, ...]:
    """The extras without which a command cannot do anything."""
    return _EXTRAS.get(command, ("ray", "report"))
