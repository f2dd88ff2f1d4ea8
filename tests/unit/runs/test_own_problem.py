"""Problems of one's own through the loop, without Ray: tables and text, workers, restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repmtl_ray import inference
from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import Experiment, ExperimentError, ModelConfig, replace
from repmtl_ray.runs import loop
from tests.helpers.gloo import Pool
from tests.helpers.problems import (
    own_experiment,
    quantile_split,
    shop_model,
    shop_split,
    text_split,
)
from tests.helpers.training import SaveAt

PROBLEMS = {"shop": shop_split, "text": text_split, "quantile": quantile_split}
by_name = pytest.mark.parametrize("problem", sorted(PROBLEMS))


def train(workers: Workers, experiment: Experiment, problem: str, **options: Any) -> Any:
    torch.set_num_threads(1)
    split = PROBLEMS[problem]
    return loop.run(
        experiment,
        train=split(range(24)),
        evaluation=split(range(100, 113)),
        workers=workers,
        **options,
    )


def history(workers: Workers, experiment: Experiment, problem: str) -> list[dict[str, float]]:
    return train(workers, experiment, problem)[1].history


@by_name
def test_it_trains_with_penalties_and_metrics_of_every_task(problem: str) -> None:
    (last,) = history(ALONE, own_experiment(epochs=1), problem)
    wanted = {
        "shop": {"click/auc", "buy/auc", "buy/average_precision"},
        "quantile": {
            "quantile/r2",
            "quantile/pearson",
            "quantile/share_below_up",
            "taste/accuracy",
        },
        "text": {"topics/auc", "score/abs_error", "score/rmse"},
    }[problem]
    assert wanted | {"rep_mtl/tsr", "rep_mtl/csa"} <= last.keys()


@by_name
@pytest.mark.parametrize("policy", ["EW", "FairGrad"])
def test_two_workers_find_what_one_finds(
    problem: str, policy: str, pool_of: Callable[[int], Pool]
) -> None:
    experiment = replace(own_experiment(), {"policy.name": policy})
    alone = history(ALONE, experiment, problem)
    for of_worker in pool_of(2).run(history, experiment, problem):
        for one, two in zip(alone, of_worker, strict=True):
            assert two == pytest.approx(one, rel=1e-7, abs=1e-9)


def test_a_run_goes_on_from_inside_an_epoch_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    experiment = own_experiment()
    place, last = tmp_path / "inside", tmp_path / "last"
    whole, progress = train(
        ALONE,
        experiment,
        "shop",
        checkpoints=SaveAt({4: place}),
        report=lambda metrics, snapshot: snapshot.save(last) if metrics["epoch"] == 2 else None,
    )
    again, resumed = train(ALONE, experiment, "shop", resume_from=place)
    assert resumed.history == progress.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    with pytest.raises(ValueError, match=r"user's own code.*load_model\(source, model=\.\.\.\)"):
        inference.load_model(last)
    loaded = inference.load_model(last, model=shop_model)
    inputs = {"user": torch.tensor([1, 2]), "item": torch.tensor([0, 3])}
    inputs["price"] = torch.tensor([0.1, 0.9], dtype=torch.float64)
    expected = whole.model.eval()(inputs)
    assert torch.equal(loaded.network(inputs)["buy"], expected["buy"])
    with pytest.raises(ValueError, match="takes user, item, price and no images"):
        inference.predict(loaded, torch.zeros(1, 8, 8, 3))


def test_an_encoder_of_timm_needs_images() -> None:
    experiment = own_experiment(model=ModelConfig(encoder="resnet18"))
    with pytest.raises(ExperimentError, match="'resnet18' sees images, but the data have none"):
        train(ALONE, experiment, "shop")


def test_a_split_without_its_model_says_so() -> None:
    import dataclasses

    split = dataclasses.replace(shop_split(range(24)), make_model=None)
    with pytest.raises(ExperimentError, match="no model was handed over"):
        loop.run(own_experiment(), train=split, evaluation=split)
