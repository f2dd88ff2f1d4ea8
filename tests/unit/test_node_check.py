"""A problem that one worker has is told to all, who would wait for it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray import node_check
from repmtl_ray.collectives import ALONE, Workers
from tests.helpers.gloo import Pool

LONG = "ä" * 2000


def told(workers: Workers, problems: Any) -> Any:
    return node_check.first_problem(problems[workers.rank], workers, torch.device("cpu"))


def test_every_worker_hears_of_the_problem_of_one(pool_of: Callable[[int], Pool]) -> None:
    assert pool_of(2).run(told, ["", "node 7 differs"]) == ["node 7 differs"] * 2


def test_workers_without_problems_hear_of_none(pool_of: Callable[[int], Pool]) -> None:
    assert pool_of(2).run(told, ["", ""]) == ["", ""]


def test_a_long_message_arrives_cut_and_readable(pool_of: Callable[[int], Pool]) -> None:
    first, second = pool_of(2).run(told, [LONG, ""])
    assert first == second
    assert LONG.startswith(first)
    assert len(first) > 500


def test_one_worker_alone_keeps_its_message() -> None:
    assert node_check.first_problem(LONG, ALONE, torch.device("cpu")) == LONG


def test_the_digest_of_the_sources_is_of_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = node_check.source_digest()
    package = tmp_path / "repmtl_ray"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(node_check.repmtl_ray, "__file__", str(package / "__init__.py"))
    other = node_check.source_digest.__wrapped__()
    (package / "__init__.py").write_text("x = 2\n")
    assert len({before, other, node_check.source_digest.__wrapped__()}) == 3
