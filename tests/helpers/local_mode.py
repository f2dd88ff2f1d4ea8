"""Runs that train in this process, by Ray Train's local mode, for tests that are not about
processes: how runs reach workers is shown by `tests/ray/test_fit.py`, and how the runs of a study
reach Ray Tune by `tests/ray/test_search.py`.

Samples are still read by Ray's tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from ray.train import ScalingConfig, UserCallback

from repmtl_ray import train
from repmtl_ray.runs import fault_tolerance, tune_reporting
from repmtl_ray.search import study
from repmtl_ray.search.study import Source, Study


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
        while (run := source.next_run()) is not None:
            try:
                study.run_trial(
                    study.config_of(run),
                    data=self.data,
                    placement=self.placement,
                    folder=folder,
                    baseline=None if baseline is None else dict(baseline),
                    facts=dict(self.facts),
                    checkpoints=self.checkpoints,
                )
            except ValueError as error:
                reasons[run.name] = study.reason_of(error)
        return reasons

    fit_here(patch)
    patch.setattr(study.Study, "train", one_after_another)
    patch.setattr(
        tune_reporting, "reporting_to_tune", lambda: contextlib.nullcontext(UserCallback())
    )
