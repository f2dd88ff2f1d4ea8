"""TorchJD and its solvers, imported when a policy first needs them.

Owns one class. They cost every process two seconds, a search has three processes a trial, and most
policies need none of it.
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module; importing happens at the first use of one of its names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
