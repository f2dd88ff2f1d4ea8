"""Reports on their way from a Ray Train run to the Tune trial that waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune

from repmtl_ray.runs import tune_reporting

pytestmark = pytest.mark.ray
NUM_REPORTS = 5


def _driver(config: Any) -> None:
    """A run that ends as soon as its last report is out."""
    with tune_reporting.reporting_to_tune() as reports:
        for epoch in range(1, NUM_REPORTS + 1):
            reports.after_report(None, [{"epoch": epoch}], None)
    if config["fails"]:
        raise ValueError("after its last report")


@pytest.mark.timeout(120)  # with Ray's own callback both stand still
def test_a_run_that_ends_at_its_last_report_hands_all_of_them_over(tmp_path: Path) -> None:
    space = {"fails": ray_tune.grid_search([False, True]), "n": ray_tune.grid_search([0, 1])}
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(_driver, {"CPU": 1}),
        param_space=space,
        run_config=ray_tune.RunConfig(name="reports", storage_path=str(tmp_path), verbose=0),
    )
    grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    assert len(results) == 4
    for result in results:
        assert result.config is not None
        assert list(result.metrics_dataframe["epoch"]) == list(range(1, NUM_REPORTS + 1))
        assert bool(result.error) == result.config["fails"]
