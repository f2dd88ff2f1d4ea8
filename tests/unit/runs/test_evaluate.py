"""Metrics of a split do not depend on how it is cut into batches, nor on which worker saw what."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from repmtl_ray.collectives import Workers
from repmtl_ray.config import ModelConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel, build_model
from repmtl_ray.runs.evaluate import evaluate
from repmtl_ray.tasks import Classification, InverseDepth, Normals, Segmentation, Task

TASKS: list[Task] = [
    Segmentation(name="segmentation", num_classes=4),
    InverseDepth(name="depth"),
    Normals(name="normal"),
]
SIZE = (32, 32)


@dataclass(frozen=True)
class Scripted(Workers):
    """A worker whose colleagues' sums are given; counts how often they talk."""

    others: list[list[Tensor]] = field(default_factory=list)
    told: list[list[Tensor]] = field(default_factory=list)

    def total_(self, tensors: Iterable[Tensor]) -> None:
        own = list(tensors)
        self.told.append([tensor.clone() for tensor in own])
        for other in self.others:
            for tensor, part in zip(own, other, strict=True):
                tensor += part


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet10t", output_stride=None, head="linear")
    built = build_model(config, TASKS, image_size=SIZE)
    for _ in range(3):  # running statistics worth using
        built(torch.randn(4, 3, *SIZE))
    return built


def _data(rows: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, *SIZE, generator=generator)
    normals = torch.randn(rows, 3, *SIZE, generator=generator)
    targets = {
        "segmentation": torch.randint(-1, 4, (rows, *SIZE), generator=generator),
        "depth": torch.rand(rows, 1, *SIZE, generator=generator).sub(0.5).clamp_min(0),
        "normal": torch.nn.functional.normalize(normals, dim=1),
    }
    targets["depth"][0] = 0  # a sample without any depth
    return images, targets


def _batches(cuts: list[int]) -> list[Batch]:
    images, targets = _data()
    batches, start = [], 0
    for size in cuts:
        part = slice(start, start + size)
        batches.append(
            Batch(
                inputs=images[part],
                targets={name: target[part] for name, target in targets.items()},
                rows=dict.fromkeys(targets, slice(0, size)),
                sample_ids=torch.arange(start, start + size),
            )
        )
        start += size
    return batches


def test_names_and_values(model: MultiTaskModel) -> None:
    found = evaluate(model, _batches([6]), TASKS)
    names = {f"{t.name}/{m}" for t in TASKS for m in [*t.metric_directions, "loss"]}
    assert set(found) == names
    images, targets = _data()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        predictions = model.eval()(images)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    for task in TASKS:
        loss, count = task.loss_sum(predictions[task.name], targets[task.name])
        assert found[f"{task.name}/loss"] == pytest.approx(float(loss / count), rel=1e-6)
        values = task.metrics(task.statistics(predictions[task.name], targets[task.name]))
        for name, value in values.items():
            assert found[f"{task.name}/{name}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 6, [2, 4], [5, 1]])
def test_the_batch_size_does_not_matter(model: MultiTaskModel, cuts: Any) -> None:
    assert evaluate(model, _batches(cuts), TASKS) == pytest.approx(
        evaluate(model, _batches([6]), TASKS), rel=1e-5
    )


@pytest.mark.parametrize("share", [0, 1, 3])
def test_workers_may_see_unequal_parts_or_nothing_and_talk_once(
    model: MultiTaskModel, share: int
) -> None:
    batches = _batches([1, 2, 2, 1])
    one, other = Scripted(rank=0, size=2), Scripted(rank=1, size=2)
    for worker, part in ((one, batches[:share]), (other, batches[share:])):
        # A first pass records what each tells; alone, one without labels fails after that.
        with contextlib.suppress(ValueError):
            evaluate(model, part, TASKS, workers=worker)
    merged = [
        evaluate(model, part, TASKS, workers=Scripted(rank=rank, size=2, others=told))
        for rank, part, told in ((0, batches[:share], other.told), (1, batches[share:], one.told))
    ]
    assert len(one.told) == len(other.told) == 1
    expected = evaluate(model, _batches([6]), TASKS)
    assert merged[0] == pytest.approx(expected, rel=1e-5)
    assert merged[1] == pytest.approx(expected, rel=1e-5)


def test_modes_running_statistics_and_gradients_stay_as_they_were(model: MultiTaskModel) -> None:
    model.train()
    model.encoder.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    evaluate(model, _batches([2, 4]), TASKS)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()


def test_an_error_on_the_way_restores_the_modes(model: MultiTaskModel) -> None:
    model.train()
    batch = _batches([1])[0]
    broken = Batch(inputs=batch.images, targets={}, rows=batch.rows, sample_ids=batch.sample_ids)
    with pytest.raises(KeyError):
        evaluate(model, [broken], TASKS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_precision_changes_metrics_by_rounding_only(model: MultiTaskModel, precision: str) -> None:
    twin = copy.deepcopy(model)
    if precision == "float64":
        twin.double()
    found = evaluate(twin, _batches([6]), TASKS, precision=precision)
    expected = evaluate(model, _batches([6]), TASKS)
    tolerance = 0.05 if precision == "bfloat16" else 1e-3
    assert found["depth/loss"] == pytest.approx(expected["depth/loss"], rel=tolerance)
    assert found["normal/mean_angle"] == pytest.approx(expected["normal/mean_angle"], rel=tolerance)


def test_every_task_is_judged_on_its_own_rows() -> None:
    tasks: list[Task] = [Classification(name=n, num_classes=3) for n in ("amazon", "dslr")]
    config = ModelConfig(encoder="resnet10t", features="pooled", head="linear")
    model = build_model(config, tasks, image_size=SIZE).eval()
    images = _data()[0]
    with torch.no_grad():
        right = {name: prediction.argmax(1) for name, prediction in model(images).items()}
    batches = []
    for rows in ({"amazon": slice(0, 4), "dslr": slice(4, 6)}, {"amazon": slice(0, 6)}):
        rows = {"dslr": slice(6, 6), **rows}  # a domain that ran out has no rows
        wrong = (right["dslr"][rows["dslr"]] + 1) % 3
        targets = {"amazon": right["amazon"][rows["amazon"]], "dslr": wrong}
        batches.append(Batch(inputs=images, targets=targets, rows=rows, sample_ids=torch.arange(6)))
    found = evaluate(model, batches, tasks)
    assert found["amazon/accuracy"] == 100
    assert found["dslr/accuracy"] == 0


def test_a_task_without_labels_in_the_split_is_named(model: MultiTaskModel) -> None:
    batch = _batches([6])[0]
    targets = {**batch.targets, "depth": torch.zeros_like(batch.targets["depth"])}
    blank = Batch(
        inputs=batch.images, targets=targets, rows=batch.rows, sample_ids=batch.sample_ids
    )
    with pytest.raises(ValueError, match="task 'depth': abs_error has no valid label"):
        evaluate(model, [blank], TASKS)
