"""Batches of the holdout split that steer a policy: each step has its own, also after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment, ExperimentError
from repmtl_ray.runs.build import selected_tasks
from repmtl_ray.runs.holdout import HoldoutBatches, without_a_part
from tests.helpers.problems import shop_split
from tests.helpers.training import run, small_experiment, split

pytestmark = pytest.mark.usefixtures("scenes_cache")


def steered(**changes: Any) -> Experiment:
    return small_experiment(
        policy__name="Auto-Lambda",
        **{"data__holdout": 0.5, "data__eval_split": "holdout", "batch_size": 2, **changes},
    )


def batches_of(experiment: Experiment) -> HoldoutBatches:
    tasks = selected_tasks(experiment)
    holdout = split(experiment, "holdout")
    return HoldoutBatches(experiment, tasks, holdout, workers=ALONE, device=torch.device("cpu"))


def test_a_step_has_one_batch_whoever_asks_and_whenever() -> None:
    whole = batches_of(steered())
    ids = [whole(step).sample_ids.tolist() for step in (0, 0, 1, 2, 3)]
    assert ids[0] == ids[1]
    assert sorted(ids[1] + ids[2]) == sorted(ids[3] + ids[4])  # two batches are the split
    assert set(ids[1]).isdisjoint(ids[2])
    later = batches_of(steered())
    assert later(3).sample_ids.tolist() == ids[4]
    assert later(1).sample_ids.tolist() == ids[2]


def test_a_steered_run_is_continued_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    experiment = steered()
    whole = run(experiment, checkpoints=tmp_path)
    continued = run(experiment, resume_from=whole.checkpoints[1])
    assert continued.history == whole.history
    assert whole.history[-1]["policy/weight/depth"] != 0.5


def test_a_run_without_a_holdout_or_with_a_small_one_is_refused_before_training() -> None:
    with pytest.raises(
        ExperimentError, match=r"'Auto-Lambda' is steered .* data.eval_split is 'val'"
    ):
        run(small_experiment(policy__name="Auto-Lambda"))
    with pytest.raises(ExperimentError, match=r"'Auto-Lambda' is steered .* batch_size is 4"):
        run(steered(data__holdout=0.25, batch_size=4))


def test_the_part_that_candidates_are_chosen_on_is_not_trained_on() -> None:
    split = shop_split(range(50))
    train, chosen = (
        set(part.rows["custom"].fetch(np.arange(len(part.rows["custom"])))["sample_id"].tolist())
        for part in without_a_part(split, 0.2)
    )
    assert (len(train), len(chosen), len(train | chosen)) == (40, 10, 50)
