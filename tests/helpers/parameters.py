"""Parameters of tests of which only a part runs with every `make test`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

FEW_POLICIES = (
    "EW",
    "UW",
    "PCGrad",
    "Aligned-MTL",
    "GradDrop",
    "MetaBalance",
    "IGBv2",
    "Sel-Update",
)
"""One policy or more for each way of talking to other workers."""


def mostly_slow(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All values as parameters of a test; those that are not kept run with the slow tests alone."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
