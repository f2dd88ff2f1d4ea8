"""A whole run without Ray: what it reports, its schedule, its errors, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray.collectives import ALONE
from repmtl_ray.config import Experiment, ExperimentError
from repmtl_ray.conversion import NonFiniteLossError
from repmtl_ray.data.batches import eval_batches, planned_batches
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.plan import TrainPlan
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.policies.base import Policy
from repmtl_ray.runs import loop
from repmtl_ray.runs.evaluate import evaluate
from repmtl_ray.runs.step import Stepper
from repmtl_ray.search.study import single_task
from tests.helpers.asserts import assert_same
from tests.helpers.parameters import mostly_slow
from tests.helpers.training import SaveAt, run, small_experiment, split, state_of

pytestmark = pytest.mark.usefixtures("scenes_cache")

OF_SEGMENTATION = {
    "segmentation/miou",
    "segmentation/pixel_accuracy",
    "segmentation/loss",
    "segmentation/train_loss",
}
OF_DEPTH = {"depth/abs_error", "depth/rel_error", "depth/loss", "depth/train_loss"}
OF_RUN = {"epoch", "global_step", "gradient_norm"}
DIAGNOSTICS = {"rep_mtl/dominance", "rep_mtl/specialisation", "rep_mtl/gradient_share"} | {
    f"rep_mtl/{quantity}/{task}"
    for quantity in ("alignment", "effective_rank", "channel_mean")
    for task in ("segmentation", "depth")
}
PENALTIES = {"rep_mtl/tsr", "rep_mtl/csa"} | DIAGNOSTICS
PLAIN = {"regularizer__lambda_tsr": 0.0, "regularizer__lambda_csa": 0.0}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, OF_SEGMENTATION | OF_DEPTH | PENALTIES),
        (
            {"regularizer__lambda_tsr": 0.0},
            OF_SEGMENTATION | OF_DEPTH | PENALTIES - {"rep_mtl/tsr"},
        ),
        (PLAIN, OF_SEGMENTATION | OF_DEPTH),
        ({"tasks": ["depth"], "policy__name": "stl", **PLAIN}, OF_DEPTH),
    ],
)
def test_metrics_are_named_by_task_and_quantity(overrides: dict[str, Any], expected: Any) -> None:
    found = run(small_experiment(**overrides))
    for metrics in found.history:
        own = {name for name in metrics if not name.startswith("policy/")}
        assert expected <= own <= expected | OF_RUN
        assert all(isinstance(value, int | float) for value in metrics.values())
        assert all(math.isfinite(value) for value in metrics.values())


def test_epochs_count_from_one_and_steps_over_all_epochs() -> None:
    found = run(small_experiment(epochs=3, data__num_train=11))  # three scenes do not fill a batch
    assert [metrics["epoch"] for metrics in found.history] == [1, 2, 3]
    assert [metrics["global_step"] for metrics in found.history] == [2, 4, 6]
    assert found.reported == found.history


def test_train_loss_is_the_mean_over_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Stepper.step

    def watched(self: Any, batch: Any, *, global_step: Any) -> Any:
        values = original(self, batch, global_step=global_step)
        seen.append(values["depth/train_loss"])
        return values

    monkeypatch.setattr(Stepper, "step", watched)
    found = run(small_experiment(data__num_train=12, epochs=1))
    assert len(seen) == 3
    assert found.history[0]["depth/train_loss"] == pytest.approx(sum(seen) / 3, rel=1e-12)


def learning_rates(
    monkeypatch: pytest.MonkeyPatch, experiment: Experiment, **options: Any
) -> tuple[Any, ...]:
    """Of every optimiser step."""
    rates = []
    original = loop.build

    def watched(*args: Any, **kwargs: Any) -> Any:
        parts = original(*args, **kwargs)
        parts.optimizer.register_step_post_hook(
            lambda optimizer, _args, _kwargs: rates.append(optimizer.param_groups[0]["lr"])
        )
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build", watched)
        found = run(experiment, **options)
    return rates, found


@pytest.mark.parametrize(("halve_at", "full"), [(None, 8), (1, 2), (2, 4), (4, 8)])
def test_the_learning_rate_halves_once_that_many_epochs_are_done(
    monkeypatch: pytest.MonkeyPatch, halve_at: int | None, full: int
) -> None:
    experiment = small_experiment(epochs=4, optimizer__halve_at_epoch=halve_at)
    rates, _ = learning_rates(monkeypatch, experiment)
    assert rates == [3e-3] * full + [1.5e-3] * (8 - full)


def test_the_schedule_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    experiment = small_experiment(epochs=3, optimizer__halve_at_epoch=2)
    _, unbroken = learning_rates(monkeypatch, experiment, checkpoints=tmp_path)
    for done, expected in ((1, [3e-3] * 2 + [1.5e-3] * 2), (2, [1.5e-3] * 2), (3, [])):
        rates, _ = learning_rates(monkeypatch, experiment, resume_from=unbroken.checkpoints[done])
        assert rates == expected


def test_the_policy_is_told_every_epoch_once_also_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = []
    monkeypatch.setattr(Policy, "begin_epoch", lambda _self, epoch: told.append(epoch))
    monkeypatch.setattr(Policy, "end_epoch", lambda _self: told.append("end"))
    experiment = small_experiment(epochs=3)
    unbroken = run(experiment, checkpoints=tmp_path)
    assert told == [0, "end", 1, "end", 2, "end"]
    told.clear()
    run(experiment, resume_from=unbroken.checkpoints[1])
    assert told == [1, "end", 2, "end"]


class NotingLoader:
    """Makes a run's batches, and says that it has read ten rows for each."""

    def __init__(self, train: loop.Split) -> None:
        self.split, self.rows_read, self.before = train, {}, {}

    def train(self, plan: TrainPlan, **options: Any) -> Iterator[Batch]:
        self.before = dict(self.rows_read)
        steps = planned_batches(plan, self.split.rows, **options)
        for number, batch in enumerate(steps, options["first_step"] + 1):
            self.rows_read["train"] = {10 * number: 7}
            yield batch


@pytest.mark.parametrize(("step", "expected"), [(3, {10: 7}), (4, {20: 7})])
def test_a_checkpoint_says_what_was_read_of_streamed_rows_up_to_its_step(
    tmp_path: Path, step: int, expected: dict[int, int]
) -> None:
    """The second epoch has the steps 3 and 4."""
    experiment = small_experiment(epochs=2, **PLAIN)
    evaluation, train = split(experiment, "val"), split(experiment, "train")
    loader = NotingLoader(train)
    options: dict[str, Any] = {"train": replace(train, loader=loader), "evaluation": evaluation}
    loop.run(experiment, **options, checkpoints=SaveAt({step: tmp_path / "saved"}))
    other = NotingLoader(train)
    options["train"] = replace(train, loader=other)
    loop.run(experiment, **options, resume_from=tmp_path / "saved")
    assert other.before == {"train": expected}


def test_one_task_alone_trains_with_policy_stl() -> None:
    both = small_experiment(epochs=4)
    alone = run(single_task(both, "depth"))
    assert list(alone.parts.model.heads) == ["depth"]
    assert alone.history[-1]["depth/loss"] < alone.history[0]["depth/loss"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"tasks": ["depth"], "policy__name": "stl"},
            "'depth' is the only one, but Rep-MTL's penalties compare tasks.*lambda_tsr.*to 0",
        ),
        (
            {"tasks": ["depth"], "policy__name": "stl", "regularizer__lambda_tsr": 0.0},
            "Rep-MTL's penalties compare tasks",
        ),
        ({"tasks": ["depth"], **PLAIN}, "'EW' weighs tasks against each other.*'stl'"),
        ({"policy__name": "stl", **PLAIN}, "'stl' trains one task, found 2"),
        ({"tasks": ["depth", "flow"]}, "'flow' is not a task of cityscapes; .*segmentation, depth"),
        (
            {"policy__name": "MTAdam", "optimizer__max_gradient_norm": 1.0},
            "max_gradient_norm is 1.0, but policy 'MTAdam' makes the update itself",
        ),
        (
            {"data__num_train": 3},
            "batch_size is 4, but the training split has 3 samples.*at most 3",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(loop, "build", lambda *_args, **_options: pytest.fail("built a model"))
    with pytest.raises(ExperimentError, match=message):
        run(small_experiment(**overrides))


def test_tasks_keep_the_order_of_the_data_set() -> None:
    experiment = small_experiment(tasks=["depth", "segmentation"])
    assert [task.name for task in loop.selected_tasks(experiment)] == ["segmentation", "depth"]


def test_reported_metrics_are_those_of_the_whole_split_at_any_batch_size() -> None:
    experiment = small_experiment(precision="float64", data__num_val=7)
    found = run(experiment)
    held_out, tasks = split(experiment, "val"), loop.selected_tasks(experiment)
    for batch_size in (1, 2, 3, 7, 50):
        batches = eval_batches(
            held_out.streams,
            held_out.rows,
            tasks=[task.name for task in tasks],
            batch_size=batch_size,
            workers=ALONE,
            dtype=torch.float64,
        )
        again = evaluate(found.parts.model, batches, tasks, precision="float64")
        for name, value in again.items():
            assert found.history[-1][name] == pytest.approx(value, rel=1e-9), name


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    options = {
        "model__head": "aspp",
        "model__head_channels": 8,
        "model__atrous_rates": [1, 2],
        "model__dropout": 0.5,
        "policy__name": "RLW",
    }
    first, second = (run(small_experiment(seed=3, **options)) for _ in range(2))
    assert first.history == second.history
    assert_same(state_of(first.parts), state_of(second.parts))
    other = run(small_experiment(seed=4, **options))
    assert other.history[0]["depth/train_loss"] != first.history[0]["depth/train_loss"]


AT_STEP_TWO = r"task '(segmentation|depth)': loss is (nan|inf) at step 2 with policy 'UW'"
AT_EVALUATION = r"task '(segmentation|depth)': loss over .*split is nan after step 1 with policy 'UW'; .* learning rate"


@pytest.mark.parametrize(
    ("batch_size", "message"), [(4, AT_STEP_TWO), (8, AT_EVALUATION)], ids=["step", "evaluation"]
)
def test_divergence_names_task_policy_and_step(
    batch_size: int, message: str, tmp_path: Path
) -> None:
    """With eight scenes, a batch of four meets the ruined weights in step 2, one of eight only in
    the evaluation."""
    experiment = small_experiment(
        optimizer__learning_rate=1e30,
        optimizer__name="sgd",
        policy__name="UW",
        batch_size=batch_size,
    )
    with pytest.raises(NonFiniteLossError, match=message):
        run(experiment, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir()), "no checkpoint of a ruined model"


def test_a_loss_that_is_no_number_leaves_the_last_good_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Depth's head breaks in step 3; its first look at the batch decides."""
    looks, models, weights = [], [], {}
    original = MultiTaskModel.predict

    def breaking(self: Any, task: Any, features: Any, image_size: Any) -> Any:
        prediction = original(self, task, features, image_size)
        if task != "depth" or not self.training:
            return prediction
        looks.append(1)
        if len(looks) < 3:
            return prediction
        models.append(self)
        weights.update({name: p.detach().clone() for name, p in self.named_parameters()})
        return prediction * math.nan

    monkeypatch.setattr(MultiTaskModel, "predict", breaking)
    reported = []
    with pytest.raises(
        NonFiniteLossError, match="task 'depth': loss is nan at step 3 with policy 'EW'"
    ):
        run(small_experiment(epochs=3), watch=reported.append)
    assert [metrics["epoch"] for metrics in reported] == [1]
    assert_same({name: p.detach() for name, p in models[0].named_parameters()}, weights)


def test_any_metric_that_is_no_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "repmtl_ray.policies.base.LossPolicy.metrics", lambda _self: {"weight/depth": math.inf}
    )
    with pytest.raises(
        NonFiniteLossError, match="policy/weight/depth is inf after step 2 with policy 'UW'"
    ):
        run(small_experiment(policy__name="UW"))


def test_an_evaluation_split_without_labels_is_an_error_that_restarts_cannot_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = small_experiment()
    original = loop.planned_eval_batches

    def unlabelled(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in original(*args, **options):
            batch.targets["depth"].zero_()
            yield batch

    monkeypatch.setattr(loop, "planned_eval_batches", unlabelled)
    with pytest.raises(ExperimentError, match=r"task 'depth': .* no valid label in the split"):
        run(experiment)


def constants(experiment: Experiment) -> tuple[Any, ...]:
    """The pixel accuracy (percent) and absolute error of the best constants for the evaluation
    split itself: its most frequent class, its median inverse depth."""
    held_out = split(experiment, "val")
    everything = held_out.rows["cityscapes"].fetch(np.arange(experiment.data.num_val))
    labels = everything["segmentation"][everything["segmentation"] >= 0]
    depths = everything["depth"][everything["depth"] > 0]
    return (
        100 * np.bincount(labels).max() / labels.size,
        np.abs(depths - np.median(depths)).mean(),
    )


@pytest.mark.parametrize("policy", mostly_slow(["EW", "PCGrad"], ["EW"]))
def test_a_trained_network_clearly_beats_the_best_constants(policy: str) -> None:
    experiment = small_experiment(
        data__num_train=64,
        data__num_val=16,
        data__augment=False,
        policy__name=policy,
        regularizer__lambda_tsr=0.1,
        regularizer__lambda_csa=0.1,
        optimizer__halve_at_epoch=8,
        epochs=12,
    )
    last = run(experiment).history[-1]
    accuracy, error = constants(experiment)
    assert last["segmentation/pixel_accuracy"] > accuracy + 20
    assert last["segmentation/miou"] > 25
    assert last["depth/abs_error"] < 0.6 * error
