"""The examples of the documents learn what they say, at a small size and without Ray."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from repmtl_ray.config import replace
from repmtl_ray.runs import loop
from tests.helpers.paths import ROOT
from tests.helpers.problems import split_of

EXAMPLES = ROOT / "docs" / "examples"
OWN_PROBLEM = ROOT / "docs" / "own_problem.md"
Rows = Any


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


class Columns:
    """Rows of a frame as `CustomData` leaves them: float32, and -1 where a class is not known."""

    def __init__(self, frame: Rows, module: Any) -> None:
        self._columns: dict[str, Any] = {}
        kinds = {task.name: task.kind for task in module.TASKS}
        for name in ("sample_id", *module.INPUTS, *kinds):
            values = frame[name].to_numpy()
            if kinds.get(name) in ("class", "binary"):
                values = np.where(np.isnan(values), -1, values).astype(np.int64)
            elif values.dtype == object and len({value.shape for value in values}) == 1:
                values = np.stack(list(values))
            self._columns[name] = values

    def __len__(self) -> int:
        return len(self._columns["sample_id"])

    def fetch(self, indices: Any, columns: Any = None) -> dict[str, Any]:
        wanted = self._columns if columns is None else columns
        return {name: self._columns[name][indices] for name in wanted}


def trained(module: Any, num_train: int, **changes: Any) -> tuple[Mapping[str, float], Rows]:
    """The metrics of the last epoch, and the rows that they are of."""
    frames = [module.rows(num_train, seed=1), module.rows(max(200, num_train // 4), seed=2)]
    splits = []
    for frame in frames:
        split = split_of(
            lambda sample_id: {},
            range(len(frame)),
            module.TASKS,
            module.model,
            inputs=module.INPUTS,
            collate=getattr(module, "collate", None),
        )
        rows: Any = {"custom": Columns(frame, module)}
        splits.append(dataclasses.replace(split, rows=rows))
    experiment = replace(module.EXPERIMENT, {"model.encoder": "custom", **changes})
    _, progress = loop.run(experiment, train=splits[0], evaluation=splits[1])
    return progress.history[-1], frames[1]


def check_recommendation(module: Any) -> None:
    metrics, frame = trained(module, 20_000, batch_size=256)
    best = module.best(frame)
    for name, value in best.items():
        assert 62 < metrics[name] < value + 1, (name, metrics[name], value)


def check_text(module: Any) -> None:
    metrics, frame = trained(module, 1500)
    for name in module.best(frame):
        assert metrics[name] > 80, name


def check_molecules(module: Any) -> None:
    metrics, frame = trained(module, 1500, epochs=4)
    ratios = [metrics[name] / value for name, value in module.spread(frame).items()]
    assert len(ratios) == 11
    assert np.mean(ratios) < 0.8, ratios


def check_attributes(module: Any) -> None:
    metrics, _ = trained(module, 600)
    accuracies = [metrics[f"{task.name}/accuracy"] for task in module.TASKS]
    assert len(accuracies) == 40
    assert np.mean(accuracies) > 72, accuracies


def check_vit_tokens(module: Any) -> None:
    metrics, _ = trained(module, 800)
    assert metrics["quadrant/accuracy"] > 60
    assert metrics["quadrant/top_k_accuracy"] >= metrics["quadrant/accuracy"]


def check_missing_labels(module: Any) -> None:
    metrics, _ = trained(module, 4000)
    assert metrics["dose/pinball_down"] < 0.08
    assert metrics["response/auc"] > 80


CHECKS: dict[str, Callable[[Any], None]] = {
    "recommendation": check_recommendation,
    "text": check_text,
    "molecules": check_molecules,
    "attributes": check_attributes,
    "vit_tokens": check_vit_tokens,
    "missing_labels": check_missing_labels,
}


@pytest.mark.parametrize("name", CHECKS)
def test_an_example_learns_what_it_says(name: str) -> None:
    CHECKS[name](example(name))


@pytest.mark.parametrize("name", CHECKS)
def test_the_page_links_to_it(name: str) -> None:
    assert f"(examples/{name}.py)" in OWN_PROBLEM.read_text()
