"""Ray Datasets of the user's own: what keeps the contract trains, what does not is explained."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
import ray.tune
import torch

from repmtl_ray import CustomData, Model, Placement, benchmark, fit, recommend, tune
from repmtl_ray.config import (
    DataConfig,
    Experiment,
    ModelConfig,
    RegularizerConfig,
    replace,
    to_dict,
)
from repmtl_ray.data.blocks import quiet
from repmtl_ray.data.custom import open_custom
from repmtl_ray.data.stream import Normalization
from repmtl_ray.prepared_run import prepare_run, read_samples, with_model
from repmtl_ray.runs import loop
from repmtl_ray.runs.checkpoint import read_description, read_model
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.runs.worker import split_of
from repmtl_ray.studies.methods import method
from repmtl_ray.studies.recommend import Recommendation
from repmtl_ray.tasks import Binary, Classification, Depth, Normals, Segmentation, Task
from tests.helpers.documents import run_notebook
from tests.helpers.local_mode import fit_here, study_here
from tests.helpers.own_policies import SlowestFirst
from tests.helpers.paths import ROOT
from tests.helpers.problems import (
    SHOP,
    SHOP_INPUTS,
    own_experiment,
    quantile_model,
    quantile_row,
    quantile_split,
    quantile_tasks,
    shop_model,
    shop_row,
    shop_split,
)
from tests.helpers.problems import split_of as split_of_rows

pytestmark = pytest.mark.ray

TASKS: tuple[Task, ...] = (
    Segmentation(name="parts", num_classes=4),
    Depth(name="depth"),
    Normals(name="normal"),
)
TASKS = (*TASKS, Classification(name="scene", num_classes=3))


def row(sample_id: int, size: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(sample_id)
    normal = rng.standard_normal((size, size, 3)).astype(np.float32)
    return {
        "sample_id": sample_id,
        "image": rng.integers(0, 256, (size, size, 3)).astype(np.uint8),
        "parts": rng.integers(-1, 4, (size, size)).astype(np.int16),
        "depth": rng.uniform(1, 9, (size, size, 1)).astype(np.float32),
        "normal": normal / np.linalg.norm(normal, axis=2, keepdims=True),
        "scene": sample_id % 3,
        "remark": "other columns do not matter",
    }


def dataset(rows: list[dict[str, Any]], blocks: int = 2) -> ray.data.Dataset:
    with quiet():
        return ray.data.from_items(rows, override_num_blocks=blocks)


def test_samples_are_numbered_by_id_whatever_their_rows_and_blocks() -> None:
    ids = [40, 7, 19, 2]
    given = CustomData(
        train=dataset([row(i) for i in ids], 3), evaluation=dataset([row(1)], 1), tasks=TASKS
    )
    train, evaluation, size = open_custom(given)
    assert size == (32, 32)
    samples = train.rows(train.streams[0]).fetch(np.arange(4))
    assert samples["sample_id"].tolist() == sorted(ids)
    for place, sample_id in enumerate(sorted(ids)):
        for name, values in row(sample_id).items():
            if name != "remark":
                np.testing.assert_array_equal(samples[name][place], values)
    assert len(evaluation.rows(evaluation.streams[0])) == 1
    again = CustomData(
        train=dataset([row(i) for i in sorted(ids)], 1), evaluation=given.evaluation, tasks=TASKS
    )
    assert open_custom(again)[0].fingerprint == train.fingerprint


def test_tasks_with_samples_of_their_own_are_trained_as_the_domains_of_office_are() -> None:
    """Against the same two streams without Ray: the same batches, and the same result to the bit."""
    ids = {"views": range(24), "orders": range(100, 140)}
    task_of = {"views": SHOP[0], "orders": SHOP[1]}

    def rows_of(source: str) -> ray.data.Dataset:
        other = task_of["orders" if source == "views" else "views"].name
        rows = [shop_row(number) for number in ids[source]]
        return dataset([{n: v for n, v in row.items() if n != other} for row in rows])

    rows = {source: rows_of(source) for source in ids}
    given = CustomData(train=rows, evaluation=rows, inputs=SHOP_INPUTS, tasks=SHOP)
    prepared = prepare_run(
        with_model(own_experiment(model=ModelConfig()), shop_model), model=shop_model, data=given
    )
    kept = split_of(read_samples(prepared), read_samples(prepared).train)
    parts = [
        split_of_rows(shop_row, ids[source], (task_of[source],), shop_model, inputs=SHOP_INPUTS)
        for source in ids
    ]
    streams = tuple(
        dataclasses.replace(part.streams[0], name=source)
        for source, part in zip(ids, parts, strict=True)
    )
    local = dataclasses.replace(
        kept,
        streams=streams,
        rows={
            stream.name: part.rows["custom"] for stream, part in zip(streams, parts, strict=True)
        },
    )
    experiment = own_experiment(epochs=1)
    histories = [loop.run(experiment, train=s, evaluation=s)[1].history for s in (kept, local)]
    assert histories[0] == histories[1]
    assert {"click/auc", "buy/auc", "rep_mtl/tsr"} <= histories[0][0].keys()

    wrong = CustomData(
        train={**rows, "orders": rows["views"]}, evaluation=rows, tasks=SHOP, inputs=SHOP_INPUTS
    )
    with pytest.raises(
        ValueError, match=r"buy: expected in one source.* in train none, in eval"
    ) as caught:
        open_custom(wrong)
    assert "click: expected in one source" in str(caught.value)


def test_every_violation_is_explained_in_one_message() -> None:
    rows = [row(i) for i in range(12)]
    for broken in rows:
        del broken["normal"]
    rows[3]["parts"] = rows[3]["parts"] + 9
    rows[5]["parts"] = rows[5]["parts"] + 2
    rows[4]["depth"] = np.full_like(rows[4]["depth"], np.nan)
    rows[6]["image"] = rows[6]["image"][:16]
    rows[7]["image"] = rows[7]["image"].astype(np.float64)
    rows[8]["scene"] = 3
    rows[9]["sample_id"] = 2
    given = CustomData(
        train=dataset(rows, 12), evaluation=dataset([{"picture": 1}], 1), tasks=TASKS
    )
    with pytest.raises(ValueError, match=r"^the data breaks the column contract in ") as caught:
        open_custom(given)
    text = str(caught.value)
    for expected in (
        "train: sample_id: 1 ids come more than once: 2",
        "train: normal: missing; there are depth, image, parts, sample_id, scene (11 samples: 0, 1,",
        "train: parts: has the labels 8, 9, 10, 11, 12; expected 0 to 3, or -1 to ignore (2 samples: 3, 5)",
        "train: depth: has 1024 values that are NaN or infinite (1 samples: 4)",
        "train: image: has dtype float64, expected uint8 or float32 (1 samples: 7)",
        "train: scene: has the labels 3; expected 0 to 2, or -1 to ignore (1 samples: 8)",
        "train: image: has several forms: uint8 (32, 32, 3) (10), ",
        "evaluation: expected the columns sample_id, image, parts, depth, normal, scene; it has pict",
    ):
        assert expected in text, text


def test_custom_data_and_their_configuration_go_together(experiment: Experiment) -> None:
    one = dataset([row(1)], 1)
    with pytest.raises(
        ValueError, match=r"data\.name is 'cityscapes', but data of your own are handed"
    ):
        fit(experiment, data=CustomData(train=one, evaluation=one, tasks=TASKS))
    with pytest.raises(ValueError, match=r"handed over with fit\(experiment, data=CustomData"):
        fit(replace(experiment, {"data": to_dict(DataConfig(name="custom"))}))


@pytest.mark.slow
def test_fit_trains_on_it_and_goes_on_with_the_same_data_only(
    experiment: Experiment, tmp_path: Path
) -> None:
    experiment = replace(
        experiment, {"data": to_dict(DataConfig(name="custom", augment=True)), "epochs": 1}
    )
    rows = [row(i) for i in range(8)]
    given = CustomData(train=dataset(rows), evaluation=dataset(rows[:3]), tasks=TASKS)
    result = fit(experiment, data=given, storage=tmp_path, name="own")
    wanted = {"parts/miou", "depth/abs_error", "normal/mean_angle", "scene/accuracy"}
    assert wanted <= result.metrics.keys()
    other = CustomData(train=dataset(rows[1:]), evaluation=given.evaluation, tasks=TASKS)
    with pytest.raises(ValueError, match="was trained on other data"):
        fit(experiment, data=other, storage=tmp_path, name="own")
    small = replace_normalization(given)
    with pytest.raises(ValueError, match="other settings of the data: deviation was None, is"):
        fit(experiment, data=small, storage=tmp_path, name="own")
    assert fit(experiment, data=given, storage=tmp_path, name="own").epochs_now == 0
    model = read_model(result.checkpoint)
    assert list(model.heads) == [task.name for task in TASKS]
    assert read_description(result.checkpoint).image_size == (32, 32)


def replace_normalization(data: CustomData) -> CustomData:
    return dataclasses.replace(data, normalize=Normalization(mean=(0.5,) * 3, std=(1.0,) * 3))


def test_an_evaluation_split_without_labels_is_refused_before_training(
    experiment: Experiment, tmp_path: Path
) -> None:
    experiment = replace(experiment, {"data": to_dict(DataConfig(name="custom"))})
    unlabelled = [{**row(i), "scene": -1} for i in range(4)]
    given = CustomData(
        train=dataset([row(i) for i in range(8)]), evaluation=dataset(unlabelled), tasks=TASKS
    )
    with pytest.raises(ValueError, match="task 'scene' has no valid label in any of its 4 samples"):
        fit(experiment, data=given, storage=tmp_path, name="none")
    assert not (tmp_path / "none").exists()


def test_an_error_in_the_rows_own_functions_is_one_line() -> None:
    def broken(_row: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("picture")

    with quiet():
        rows = ray.data.range(2).map(broken)
    with pytest.raises(ValueError, match="its rows cannot be read: KeyError: 'picture'"):
        open_custom(CustomData(train=rows, evaluation=rows, tasks=TASKS))


def test_blocks_of_other_types_and_lengths_are_refused_or_read_as_they_are() -> None:
    prices: list[Any] = [1, 2, 0.75, 0.25]
    rows = [{**shop_row(number), "price": prices[number]} for number in range(4)]
    with pytest.raises(
        ValueError, match=r"train: price: has several forms: .*int64 .*expected one"
    ):
        open_custom(dataclasses.replace(shop(), train=dataset(rows, 4)))
    words = [[7], [1, 2], [3, 4], [5]]
    for listed in (list, np.array):
        text = dataset(
            [{"sample_id": i, "tokens": listed(words[i]), "click": 1} for i in range(4)], 4
        )
        given = CustomData(
            train=text,
            evaluation=text,
            inputs=("tokens",),
            tasks=(Binary(name="click"),),
            collate=lambda columns: {},
        )
        split, _, _ = open_custom(given)
        for order in ([0, 1, 2, 3], [1, 0, 3, 2], [3, 0], [1, 2]):
            found = split.rows(split.streams[0]).fetch(np.array(order))
            assert [part.tolist() for part in found["tokens"]] == [words[i] for i in order]


def shop() -> CustomData:
    table = dataset([shop_row(number) for number in range(24)])
    return CustomData(train=table, evaluation=table, inputs=SHOP_INPUTS, tasks=SHOP)


@pytest.mark.slow
def test_a_search_and_a_benchmark_train_a_model_and_a_policy_of_ones_own(tmp_path: Path) -> None:
    experiment = own_experiment(model=ModelConfig(), epochs=1)
    given = shop()
    searched = tune(
        experiment,
        {
            "regularizer.share": 0.1,
            "policy.name": ray.tune.grid_search(["EW", SlowestFirst]),
        },
        model=shop_model,
        data=given,
        num_samples=1,
        scheduler="hyperband",
        storage=tmp_path,
        name="search",
    )
    assert searched.table["status"].tolist() == ["done", "done"]
    assert set(searched.baseline) >= {"click/auc", "buy/auc"}
    split = shop_split(range(24))
    _, alone = loop.run(
        own_experiment(epochs=1, regularizer=RegularizerConfig(share=0.1)),
        train=split,
        evaluation=split,
    )
    (row,) = [r for _, r in searched.table.iterrows() if r["policy"] == "EW"]
    assert row["click/auc"] == pytest.approx(alone.history[0]["click/auc"], rel=1e-6)
    compared = benchmark(
        experiment,
        {"EW": {"policy.name": "EW"}, "Slowest": {"policy.name": SlowestFirst}},
        model=shop_model,
        data=given,
        seeds=(0,),
        storage=tmp_path,
        name="compared",
    )
    assert [record["method"] for record in compared.records] == ["EW", "Slowest"]
    assert not compared.failures
    assert compared.records[1]["experiment"]["policy"]["name"].startswith("SlowestFirst@")


def test_recommend_compares_methods_on_a_model_and_data_of_ones_own(tmp_path: Path) -> None:
    experiment, given = own_experiment(model=ModelConfig(), epochs=1), shop()

    def recommended(data: CustomData, model: Any = shop_model, **options: Any) -> Recommendation:
        options = {"names": ("EW", "FairGrad"), "seeds": (0, 1), **options}
        return recommend(experiment, data=data, model=model, directory=tmp_path, **options)

    found = recommended(given)
    expected = [(name, seed) for seed in (0, 1) for name in ("EW", "FairGrad")]
    assert [(row.variant, row.seed) for row in found.rows] == expected
    assert not found.failures
    assert "| click ~ buy |" in found.conflicts
    split = shop_split(range(24))
    plain = replace(own_experiment(epochs=1), method("EW"))
    _, alone = loop.run(plain, train=split, evaluation=split)
    first = found.rows[0].metrics
    assert first == pytest.approx({name: alone.history[0][name] for name in first}, rel=1e-6)
    assert recommended(given).rows == found.rows

    def other_model() -> Model:
        return Model(encoder=shop_model().encoder, heads=shop_model().heads)

    rows = dataset([shop_row(number) for number in range(1, 25)])
    for data, model in ((dataclasses.replace(given, train=rows), shop_model), (given, other_model)):
        other = recommended(data, model, names=("EW",), seeds=(0,))
        assert other.file != found.file
        assert other.rows[0].seconds != found.rows[0].seconds  # it was trained


@pytest.mark.slow
def test_own_losses_and_metrics_are_the_same_on_two_workers_after_a_stop_and_in_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, then this one from inside an epoch, then a benchmark in this one."""
    table = dataset([quantile_row(number) for number in range(24)], 3)
    given = CustomData(train=table, evaluation=table, inputs=SHOP_INPUTS, tasks=quantile_tasks())
    experiment = own_experiment(model=ModelConfig(), epochs=1)
    options: dict[str, Any] = {"model": quantile_model, "data": given, "storage": tmp_path}
    two = fit(
        experiment,
        name="two",
        placement=Placement(num_workers=2),
        checkpoints=CheckpointConfig(every_steps=2, keep=9),
        **options,
    )
    split = quantile_split(range(24))
    _, alone = loop.run(own_experiment(epochs=1), train=split, evaluation=split)
    expected = {name: alone.history[0][name] for name in two.metrics}
    assert {"quantile/r2", "quantile/share_below_up", "taste/accuracy"} <= expected.keys()
    assert two.metrics == pytest.approx(expected, rel=1e-7, abs=1e-9)

    fit_here(monkeypatch)
    earlier = next(iter(tmp_path.glob("two/checkpoint_000000_00000002_*")))
    shutil.copytree(earlier, tmp_path / "one" / earlier.name)
    resumed = fit(experiment, name="one", **options)
    assert resumed.epochs_now == 1
    assert resumed.metrics == pytest.approx(expected, rel=1e-7, abs=1e-9)

    study_here(monkeypatch)
    methods = {"EW": {"policy.name": "EW"}}
    compared = benchmark(experiment, methods, seeds=(0,), name="compared", **options)
    assert not compared.failures
    (record,) = compared.records
    for name in ("quantile/r2", "quantile/share_below_up", "taste/accuracy"):
        assert record["metrics"][name] == pytest.approx(expected[name], rel=1e-7, abs=1e-9)


@pytest.mark.slow
def test_another_model_function_does_not_continue_a_run(tmp_path: Path) -> None:
    experiment, given = own_experiment(model=ModelConfig(), epochs=1), shop()
    result = fit(experiment, model=shop_model, data=given, storage=tmp_path, name="shop")
    split = shop_split(range(24))
    _, alone = loop.run(own_experiment(epochs=1), train=split, evaluation=split)
    expected = {name: alone.history[0][name] for name in result.metrics}
    assert result.metrics == pytest.approx(expected, rel=1e-6)

    def other_model() -> Model:
        return Model(encoder=shop_model().encoder, heads=shop_model().heads)

    with pytest.raises(ValueError, match=r"another experiment: model\.code was"):
        fit(experiment, model=other_model, data=given, storage=tmp_path, name="shop")


@pytest.mark.slow
def test_the_notebook_of_own_data_runs_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with quiet():
        ray.data.DataContext.get_current()  # the first one of a process warns of a setting of Ray's own
    texts = run_notebook(ROOT / "docs" / "notebooks" / "own_data.ipynb")
    assert "click/auc" in texts[-3][1]
    assert texts[-2][1] == texts[-2][0]  # the names of both tasks
    assert "single-task" in texts[-1][1]
    assert "single-task" in texts[-1][0]


def test_other_code_that_makes_inputs_is_other_data() -> None:
    def scaled(columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.as_tensor(values) for name, values in columns.items()}
        return {**tensors, "price": tensors["price"] * 2}

    def halved(columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.as_tensor(values) for name, values in columns.items()}
        return {**tensors, "price": tensors["price"] / 2}

    def fingerprint(given: CustomData) -> str:
        experiment = with_model(own_experiment(model=ModelConfig()), shop_model)
        prepared = prepare_run(experiment, model=shop_model, data=given)
        return read_samples(prepared).fingerprint

    given = shop()
    variants = (None, scaled, halved)
    prints = [fingerprint(dataclasses.replace(given, collate=collate)) for collate in variants]
    assert len(set(prints)) == 3
    assert fingerprint(given) == prints[0]
