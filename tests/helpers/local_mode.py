"""Runs that train in this process, by Ray Train's local mode, for tests that are not about
processes: how runs reach workers is shown by `tests/ray/test_fit.py`, and how the runs of a study
reach Ray Tune by `tests/ray/test_search.py`.

Samples are still read by Ray's tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ray.train import ScalingConfig

from repmtl_ray import train
from repmtl_ray.runs import fault_tolerance
from repmtl_ray.search import study
from repmtl_ray.search.study import Source, Study
from repmtl_ray.search.trial import RunsInProcess, TrialSettings


def fit_here(patch: pytest.MonkeyPatch) -> None:
    """From now on every run trains in this process, as one worker."""

    def without_workers(**settings: Any) -> ScalingConfig:
        return ScalingConfig(**{**settings, "num_workers": 0})

    patch.setattr(train, "ScalingConfig", without_workers)
    # Local mode has no notices of preemption.
    patch.setattr(fault_tolerance.FaultTolerance, "_noticed", lambda self: False)


def study_here(patch: pytest.MonkeyPatch) -> None:
    """From now on the runs of a study train in this process, one after the other."""

    def one_after_another(
        self: Study,
        source: Source,
        *,
        folder: str,
        baseline: Mapping[str, float] | None = None,
        **options: Any,
    ) -> dict[str, str]:
        reasons = {}
        runs = RunsInProcess(
            TrialSettings(
                data=self.data,
                placement=self.placement,
                folder=folder,
                baseline=baseline,
                facts=self.facts,
                checkpoints=self.checkpoints,
                callbacks=self.callbacks,
            )
        )
        while (run := source.next_run()) is not None:
            for result in runs.results(run):
                if "error" in result:
                    reasons[run.name] = result["error"]
        return reasons

    patch.setattr(study.Study, "train", one_after_another)
