"""Tuned scalarisation: searched on samples that no reported number is of, and read back when repeated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from repmtl_ray.cli.commands import benchmark
from repmtl_ray.config import Experiment, replace
from repmtl_ray.studies import scalarisation
from repmtl_ray.studies.benchmark import method_runs
from tests.helpers.searches import BASE, OUTCOMES, Outcome, search_result


def test_the_search_is_on_the_holdout_and_the_best_weights_become_a_method(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[Experiment, dict[str, Any]]] = []
    best = replace(BASE, {"policy.name": "Constant", "policy.arguments": {"weights": [0.4, 1.6]}})

    def tune(experiment: Experiment, space: Any, **options: Any) -> Any:
        calls.append((experiment, options))
        folder = tmp_path / options["name"]
        folder.mkdir(exist_ok=True)
        (folder / "study.json").write_text("{}")
        result = search_result(OUTCOMES, experiment)
        object.__setattr__(result, "best", best)
        return result

    monkeypatch.setattr(scalarisation, "tune", tune)
    changes = scalarisation.tuned(BASE, 5, storage=tmp_path)
    experiment, options = calls[0]
    assert (experiment.data.eval_split, experiment.data.holdout) == ("holdout", 0.1)
    assert (options["num_samples"], options["resume"]) == (5, False)
    assert changes["policy.arguments"] == {"weights": [0.4, 1.6]}
    assert method_runs(BASE, {"scalarisation": changes}, [0])[0].facts == {
        "method": "scalarisation"
    }
    assert scalarisation.tuned(BASE, 5, storage=tmp_path) == changes
    assert calls[1][1]["resume"]
    assert calls[1][1]["name"] == options["name"]


FAILED = [Outcome({"policy.name": "UW"}, error="loss is nan")]


def test_weights_that_cannot_be_trained_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        scalarisation,
        "tune",
        lambda experiment, space, **options: search_result(FAILED, experiment),
    )
    with pytest.raises(ValueError, match="none of the 3 weights could be trained"):
        scalarisation.tuned(BASE, 3, storage=tmp_path)


def test_a_holdout_of_the_protocol_stays() -> None:
    own = replace(BASE, {"data.holdout": 0.25, "data.eval_split": "holdout"})
    assert scalarisation.held_out(own) == own


def test_the_command_searches_the_weights_and_trains_them_beside_the_methods(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = replace(BASE, {"policy.name": "Constant", "policy.arguments": {"weights": [0.4, 1.6]}})
    searches: list[dict[str, Any]] = []
    cells: dict[str, Any] = {}

    def tune(experiment: Experiment, space: Any, **options: Any) -> Any:
        searches.append(options)
        result = search_result(OUTCOMES, experiment)
        object.__setattr__(result, "best", best)
        return result

    def compared(arguments: Any, methods: dict[str, Any], *, stem: str) -> Any:
        cells.update(methods)
        return search_result(OUTCOMES, BASE), None

    monkeypatch.setattr(scalarisation, "tune", tune)
    monkeypatch.setattr(benchmark.comparison, "run", compared)
    parser = argparse.ArgumentParser()
    benchmark.add_options(parser)
    options = ["scenes", "--methods", "EW", "scalarisation", "--scalarisation-samples", "3"]
    benchmark.run(parser.parse_args([*options, "--storage", str(tmp_path), "--log", "csv"]))
    assert [search["num_samples"] for search in searches] == [3]
    assert "log" not in searches[0]  # that option is of the rows
    assert list(cells) == ["EW", "scalarisation"]
    assert cells["scalarisation"]["policy.arguments"] == {"weights": [0.4, 1.6]}
