"""With a real Ray: rows that cannot be read by number are streamed, and what is promised of them holds."""

from __future__ import annotations

import io
import itertools
import os
import signal
import tarfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ray.data
import torch

from repmtl_ray import CustomData, Placement, StreamedRows, fit, recommend
from repmtl_ray.collectives import Workers
from repmtl_ray.config import DataConfig, Experiment, replace, to_dict
from repmtl_ray.data.augment import augment
from repmtl_ray.data.blocks import quiet
from repmtl_ray.data.cache import CachedSplit
from repmtl_ray.data.columns import Batch
from repmtl_ray.data.custom import OpenedSplit, open_custom
from repmtl_ray.data.data_actor import RunBatches
from repmtl_ray.data.plan import DataError, EvalPlan, TrainPlan
from repmtl_ray.data.stream import Kind
from repmtl_ray.data.streamed import StreamedSplit
from repmtl_ray.data.streamed_loader import StreamedLoader, start_reader
from repmtl_ray.runs.callbacks import Callback, StepInfo
from repmtl_ray.runs.checkpoint_manager import CheckpointConfig
from repmtl_ray.tasks import Classification, Depth, Task
from tests.helpers.s3 import BUCKET, S3
from tests.helpers.streamed_rows import made, made_if_even

pytestmark = pytest.mark.ray

TASKS: tuple[Task, ...] = (Depth(name="depth"), Classification(name="scene", num_classes=3))
NUM_ROWS = 20


@pytest.fixture(scope="module")
def lazy() -> ray.data.Dataset:
    """A function leaves rows out: nothing can say how many rows come, and none is read by number."""
    with quiet():
        return ray.data.range(NUM_ROWS * 2, override_num_blocks=4).flat_map(made_if_even)


@pytest.fixture(scope="module")
def few() -> ray.data.Dataset:
    """Rows that fit."""
    with quiet():
        return ray.data.from_items([made({"id": number}) for number in (3, 1, 2)])


def loaders(
    splits: tuple[OpenedSplit, OpenedSplit],
    num_workers: int,
    *,
    tasks: tuple[str, ...] = ("depth", "scene"),
    augment: bool = True,
) -> list[tuple[RunBatches, StreamedLoader]]:
    """Of every worker of a run, with one reader."""
    found: list[tuple[RunBatches, StreamedLoader]] = []
    reader: Any = None
    for rank in range(num_workers):
        shared: dict[str, Any] = {"tasks": tasks, "workers": Workers(rank, num_workers)}
        batches = RunBatches(
            train=TrainPlan(
                streams=splits[0].streams, batch_size=8, seed=7, augment=augment, **shared
            ),
            evaluation=EvalPlan(streams=splits[1].streams, batch_size=8 // num_workers, **shared),
            train_split=splits[0],
            eval_split=splits[1],
        )
        reader = reader or start_reader(batches, num_cpus=2, name=f"reader {uuid.uuid4().hex}")
        found.append((batches, StreamedLoader(batches, reader)))
    return found


def run(batches: RunBatches, loader: StreamedLoader) -> Iterator[Batch]:
    """Epoch 1 and its evaluation."""
    yield from loader.train(batches.train, epoch=1, first_step=0, dtype=torch.float32)
    yield from loader.evaluate(batches.evaluation, epoch=1, dtype=torch.float32)


def assert_views(batch: Batch) -> None:
    """Whether every row is the view of its sample that seed, epoch and id decide."""
    kinds: dict[str, Kind] = {"image": "image", "depth": "depth", "scene": "class"}
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        rng = np.random.default_rng([7, 1, 0, zlib.crc32(b"custom"), sample_id])
        sample = made({"id": sample_id})
        view = augment({name: np.asarray(sample[name]) for name in kinds}, rng=rng, kinds=kinds)
        assert torch.equal(batch.targets["depth"][row, 0], torch.from_numpy(view["depth"][..., 0]))
        assert int(batch.targets["scene"][row]) == sample_id % 3


def test_two_workers_and_a_restart_get_the_batches_of_one_worker(lazy: ray.data.Dataset) -> None:
    rows = StreamedRows(dataset=lazy, num_rows=NUM_ROWS, shuffle_window=6)
    *splits, size = open_custom(CustomData(train=rows, evaluation=rows, tasks=TASKS))
    assert size == (32, 32)
    assert all(isinstance(split, StreamedSplit) for split in splits)
    opened = splits[0], splits[1]
    (one,) = loaders(opened, 1)
    alone = list(run(*one))
    assert [batch.num_rows for batch in alone] == [8, 8, 8, 8, 4], (
        "two of training, then evaluation"
    )
    first, second, *evaluated = [batch.sample_ids.tolist() for batch in alone]
    assert list(itertools.chain(*evaluated)) == list(range(0, 2 * NUM_ROWS, 2)), "each row once"
    assert len({*first, *second}) == 16
    assert first + second != sorted(first + second)
    for batch in alone[:2]:
        assert_views(batch)
    for whole, *parts in zip(alone, *(run(*worker) for worker in loaders(opened, 2)), strict=True):
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), whole.sample_ids)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        for task, values in whole.targets.items():
            assert torch.equal(torch.cat([part.targets[task] for part in parts]), values)
    ((batches, loader),) = loaders(opened, 1)
    (continued,) = loader.train(batches.train, epoch=1, first_step=1, dtype=torch.float32)
    assert torch.equal(continued.images, alone[1].images)


@pytest.mark.slow  # two runs on Ray
def test_a_run_that_continues_in_its_first_epoch_refuses_rows_in_another_order(
    lazy: ray.data.Dataset, few: ray.data.Dataset
) -> None:
    """After the 18 rows that the first batch's window has read, of which the first 16 are the same."""

    def otherwise(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "scene": (row["scene"] + (row["sample_id"] == 32)) % 3}

    def opened(dataset: ray.data.Dataset) -> tuple[RunBatches, StreamedLoader]:
        rows = StreamedRows(dataset=dataset, num_rows=NUM_ROWS, shuffle_window=10)
        train, evaluation, _ = open_custom(CustomData(train=rows, evaluation=few, tasks=TASKS))
        (one,) = loaders((train, evaluation), 1)
        return one

    batches, loader = opened(lazy)
    steps = loader.train(batches.train, epoch=0, first_step=0, dtype=torch.float32)
    next(steps)
    seen = dict(loader.rows_read)
    assert list(seen["train"]) == [18]
    expected = next(steps)
    for dataset, is_same in ((lazy, True), (lazy.map(otherwise), False)):
        batches, loader = opened(dataset)
        loader.rows_read = dict(seen)
        continued = loader.train(batches.train, epoch=0, first_step=1, dtype=torch.float32)
        if is_same:
            assert torch.equal(next(continued).sample_ids, expected.sample_ids)
        else:
            with pytest.raises(DataError, match=r"^train: its first 18 rows came in another order"):
                next(continued)


def test_what_is_wrong_with_the_first_rows_is_said_before_training(few: ray.data.Dataset) -> None:
    def far(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "scene": row["scene"] + 2, "depth": row["depth"].astype(np.float64)}

    with quiet():
        broken = StreamedRows(dataset=few.map(far), num_rows=3)
        other = ray.data.from_items([{"picture": 1}])
    data = CustomData(train=broken, evaluation=other, tasks=TASKS)
    with pytest.raises(ValueError, match=r"^the data breaks the column contract in") as caught:
        open_custom(data)
    text = str(caught.value)
    assert "train: depth: has dtype float64, expected float32 (3 samples: 1, 2, 3)" in text
    assert (
        "train: scene: has the labels 3; expected 0 to 2, or -1 to ignore (2 samples: 1, 2)" in text
    )
    assert "evaluation: expected the columns sample_id, image, depth, scene; it has picture" in text


def test_rows_that_fit_are_kept_and_an_error_of_the_others_functions_names_what_was_raised(
    lazy: ray.data.Dataset, few: ray.data.Dataset, tmp_path: Path
) -> None:
    def late(row: dict[str, Any]) -> dict[str, Any]:
        if row["sample_id"] == 36 and (tmp_path / "opened").exists():
            raise KeyError("s3://bucket/36.png")
        return row

    rows = StreamedRows(dataset=lazy.map(late), num_rows=NUM_ROWS, shuffle_window=1)
    train, evaluation, _ = open_custom(CustomData(train=rows, evaluation=few, tasks=TASKS))
    assert isinstance(evaluation, CachedSplit)
    (tmp_path / "opened").touch()
    ((batches, loader),) = loaders((train, evaluation), 1)
    (kept,) = loader.evaluate(batches.evaluation, epoch=1, dtype=torch.float32)
    assert kept.sample_ids.tolist() == [1, 2, 3]
    with pytest.raises(
        DataError, match=r"^train: its rows cannot be read: KeyError: 's3://bucket/36"
    ):
        list(run(batches, loader))


def test_streamed_rows_need_a_cpu_that_no_worker_has(
    lazy: ray.data.Dataset, experiment: Experiment, tmp_path: Path
) -> None:
    experiment = replace(experiment, {"data": to_dict(DataConfig(name="custom"))})
    rows = StreamedRows(dataset=lazy, num_rows=NUM_ROWS)
    data = CustomData(train=rows, evaluation=rows, tasks=TASKS)
    with pytest.raises(ValueError, match=r"data is 'worker', but StreamedRows are read by tasks"):
        fit(experiment, data=data, placement=Placement(data="worker"), storage=tmp_path)
    cpus = int(ray.cluster_resources()["CPU"])
    with pytest.raises(ValueError, match=r"data is 'ray': .* leave 0 of .* free, but .* need 1"):
        fit(experiment, data=data, placement=Placement(cpus_per_worker=cpus), storage=tmp_path)
    with pytest.raises(
        ValueError, match="recommend trains in this process on samples that are kept"
    ):
        recommend(experiment, data=data, directory=tmp_path)


@dataclass
class KillsReader(Callback):
    """Kills the process of the run's reader after the second step, once.

    Args:
        noted: a file that says that it was done.
    """

    noted: Path

    def on_step_end(self, step: StepInfo) -> None:
        if step.global_step == 2 and not self.noted.exists():
            self.noted.touch()
            (name,) = (n for n in ray.util.list_named_actors() if n.startswith("row reader"))
            pid = ray.get_actor(name).__ray_call__.remote(lambda _reader: os.getpid())
            os.kill(ray.get(pid), signal.SIGKILL)


@pytest.mark.slow
def test_two_workers_on_streamed_parquet_and_a_killed_reader_leave_the_metrics_of_one_worker(
    few: ray.data.Dataset, experiment: Experiment, tmp_path: Path
) -> None:
    with quiet():
        numbers = ray.data.range(NUM_ROWS * 2, override_num_blocks=4)
        numbers.write_parquet(str(tmp_path / "rows"))
        lazy = ray.data.read_parquet(str(tmp_path / "rows")).flat_map(made_if_even)
    config = to_dict(DataConfig(name="custom", augment=True))
    experiment = replace(experiment, {"data": config, "epochs": 1, "batch_size": 4})
    rows = StreamedRows(dataset=lazy, num_rows=NUM_ROWS, shuffle_window=8)
    data = CustomData(train=rows, evaluation=few, tasks=TASKS)
    one, two = (
        fit(experiment, data=data, placement=Placement(num_workers=number), storage=tmp_path)
        for number in (1, 2)
    )
    (found,), (other,) = one.history, two.history
    assert found == pytest.approx(other, rel=1e-6)
    killed = fit(
        experiment,
        data=data,
        storage=tmp_path,
        checkpoints=CheckpointConfig(every_steps=1),
        callbacks=[KillsReader(tmp_path / "killed")],
    )
    assert (tmp_path / "killed").exists()
    assert killed.history == one.history


def assert_all_rows(rows: StreamedRows) -> None:
    """Whether evaluation reads the rows 0, 1, ... of `made` in this order, each once."""
    *splits, _ = open_custom(CustomData(train=rows, evaluation=rows, tasks=TASKS))
    ((batches, loader),) = loaders((splits[0], splits[1]), 1)
    found = list(loader.evaluate(batches.evaluation, epoch=0, dtype=torch.float32))
    numbers = list(range(rows.num_rows))
    assert [number for batch in found for number in batch.sample_ids.tolist()] == numbers
    pixels = (torch.cat([batch.images for batch in found]) * 255).round().byte()
    expected = np.stack([made({"id": number})["image"] for number in numbers])
    assert torch.equal(pixels.permute(0, 2, 3, 1), torch.from_numpy(expected))


@pytest.mark.slow
def test_rows_of_webdataset_are_streamed_in_the_order_of_their_files(tmp_path: Path) -> None:
    def decoded(row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["__key__"])
        return {"sample_id": number, "image": row["png"], "depth": row["npy"], "scene": row["cls"]}

    for first in (0, 5):
        with tarfile.open(tmp_path / f"{first}.tar", "w") as tar:
            for number in range(first, first + 5):
                sample, depth = made({"id": number}), io.BytesIO()
                np.save(depth, sample["depth"])
                png = cv2.imencode(".png", sample["image"][..., ::-1])[1].tobytes()
                parts = {"png": png, "npy": depth.getvalue(), "cls": str(number % 3).encode()}
                for kind, content in parts.items():
                    entry = tarfile.TarInfo(f"{number:03}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    with quiet():
        dataset = ray.data.read_webdataset(str(tmp_path)).map(decoded)
    assert_all_rows(StreamedRows(dataset=dataset, num_rows=10))


@pytest.mark.slow
def test_rows_of_parquet_files_in_a_bucket_are_streamed(s3: S3) -> None:
    with quiet():
        numbers = ray.data.range(10, override_num_blocks=2)
        numbers.map(made).write_parquet(f"{BUCKET}/rows", filesystem=s3.filesystem())
        assert sum(key.endswith(".parquet") for key in s3.keys("rows/")) == 2
        dataset = ray.data.read_parquet(f"{BUCKET}/rows", filesystem=s3.filesystem())
    assert_all_rows(StreamedRows(dataset=dataset, num_rows=10))


@pytest.mark.slow
def test_the_rows_of_a_join_are_streamed_in_the_order_that_sort_gives_them() -> None:
    """Of images with labels, which lie in two Datasets."""

    def without_label(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in made(row).items() if name in ("sample_id", "depth")}

    def label(row: dict[str, Any]) -> dict[str, Any]:
        return {"sample_id": row["id"], "scene": row["id"] % 3}

    def with_image(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "image": made({"id": row["sample_id"]})["image"]}

    with quiet():
        numbers = ray.data.range(10, override_num_blocks=2)
        joined = numbers.map(without_label).join(
            numbers.map(label), join_type="inner", num_partitions=2, on=("sample_id",)
        )
        dataset = joined.sort("sample_id").map(with_image)
    assert_all_rows(StreamedRows(dataset=dataset, num_rows=10))


@pytest.mark.slow
def test_streamed_rows_never_lie_in_the_object_store_in_whole(spilled: Callable[[], bool]) -> None:
    """400 MB of rows go through a store of 200 MB, while their consumer is slow."""

    def large(row: dict[str, Any]) -> dict[str, Any]:
        image = np.full((512, 682, 3), row["id"] % 256, dtype=np.uint8)
        return {"sample_id": row["id"], "image": image, "scene": row["id"] % 3}

    with quiet():
        dataset = ray.data.range(400, override_num_blocks=40).map(large)
        small = ray.data.from_items([large({"id": number}) for number in (0, 1)])
    rows = StreamedRows(dataset=dataset, num_rows=400, shuffle_window=16)
    tasks = (Classification(name="scene", num_classes=3),)
    *splits, _ = open_custom(CustomData(train=rows, evaluation=small, tasks=tasks))
    ((batches, loader),) = loaders((splits[0], splits[1]), 1, tasks=("scene",), augment=False)
    seen = []
    for number, batch in enumerate(run(batches, loader)):
        time.sleep(2 if number in (2, 20) else 0)
        seen += batch.sample_ids.tolist()
    assert sorted(seen[:-2]) == list(range(400))
    assert not spilled()
