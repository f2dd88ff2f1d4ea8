"""How many samples per second come from data actors, compared with a torch DataLoader of as many processes.

    python -m bench.data_actors [--work light decode] [--processes 1 2] [--epochs 3]

"light" reads augmented frames of 128 x 256 from shards on disk; the DataLoader reads the same frames
from npy files, as a user of torch alone would. "decode" reads official Cityscapes files (PNG of 1024 x
2048: photograph, labels, disparity) and makes samples of 128 x 256 of them; the DataLoader calls the
same functions. Both augment, and make the same batches of 16. The consumer is this process, which only
takes batches, and every process of the loaders runs on the cores that it leaves.

A rate is the median of epochs after the first one; the ways come one after the other, in turns.
"First batch" is the time from nothing to it, with the start of the processes. "Waiting" is the share
of one epoch of training (a small network on this processor) in which a step waited for its batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.data import BATCH_SIZE, TASKS, Collate, Frames, _nothing, write_frames
from repmtl_ray import cluster
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.data.augment import augment
from repmtl_ray.data.cache import UncachedSplit, check_streams
from repmtl_ray.data.data_actor import RunBatches
from repmtl_ray.data.plan import EvalPlan, TrainPlan
from repmtl_ray.data.prepare import prepare
from repmtl_ray.data.ray_pipeline import RayLoader
from repmtl_ray.data.sources import open_streams
from repmtl_ray.data.stream import Stream
from repmtl_ray.runs import loop
from repmtl_ray.runs.build import Split
from repmtl_ray.runs.callbacks import Callback, StepInfo

Epochs = Callable[[int], Iterator[Any]]
"""From the number of an epoch to its batches."""


class Decoded(Dataset):
    """Samples of a stream, decoded and augmented when they are asked for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.stream.load(index)
        rng = np.random.default_rng([0, 0, 0, 0, index])
        return augment(sample, rng=rng, kinds={"image": "image", **self.stream.kinds})


def write_official(root: Path, num_frames: int) -> None:
    """Files as Cityscapes has them: smooth photographs, labels in blocks, 16-bit disparity."""
    for split, count in (("train", num_frames), ("val", 1)):
        for index in range(count):
            rng = np.random.default_rng([index, count])
            small = rng.integers(0, 256, (64, 128, 3)).astype(np.uint8)
            noise = rng.integers(0, 16, (1024, 2048, 3)).astype(np.uint8)
            image = cv2.resize(small, (2048, 1024)) // 2 + noise
            ids = rng.integers(0, 34, (32, 64)).astype(np.uint8).repeat(32, 0).repeat(32, 1)
            disparity = cv2.resize(
                rng.integers(0, 30_000, (64, 128)).astype(np.uint16), (2048, 1024)
            )
            for part, kind, pixels in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", ids),
                ("disparity", "disparity", disparity),
            ):
                folder = root / part / split / f"{split}city"
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{split}city_{index:06}_000019_{kind}.png"), pixels)


def torch_epochs(dataset: Dataset, stream: Stream, processes: int) -> Epochs:
    loader = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=processes,
        collate_fn=Collate(replace(stream, load=_nothing, reload=None)),
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    return lambda _epoch: iter(loader)


def loader_of(
    splits: tuple[UncachedSplit, UncachedSplit], processes: int, epochs: int
) -> RayLoader:
    train, evaluation = splits
    batches = RunBatches(
        train=TrainPlan(
            streams=train.streams,
            tasks=TASKS,
            batch_size=BATCH_SIZE,
            seed=0,
            workers=ALONE,
            augment=True,
        ),
        evaluation=EvalPlan(
            streams=evaluation.streams, tasks=TASKS, batch_size=BATCH_SIZE, workers=ALONE
        ),
        train_split=train,
        eval_split=evaluation,
    )
    return RayLoader(batches, num_epochs=epochs, num_actors=processes)


def ray_epochs(loader: RayLoader) -> Epochs:
    plan, evaluation = loader.batches.train, loader.batches.evaluation

    def epoch(number: int) -> Iterator[Any]:
        yield from loader.train(plan, epoch=number, first_step=0, dtype=torch.float32)
        yield from loader.evaluate(evaluation, epoch=number, dtype=torch.float32)

    return epoch


def measured(epochs: Epochs, num_epochs: int) -> tuple[float, list[float]]:
    """Seconds to the first batch, and samples per second of each epoch after the first."""
    begin, first, rates = time.perf_counter(), 0.0, []
    for number in range(num_epochs + 1):
        start, num_batches = time.perf_counter(), 0
        for _ in epochs(number):
            num_batches += 1
            if number == 0 and num_batches == 1:
                first = time.perf_counter() - begin
        if number:
            rates.append(num_batches * BATCH_SIZE / (time.perf_counter() - start))
    return first, rates


class Waiting(Callback):
    """Sums the time of steps and what of it was waiting, after the first step."""

    def __init__(self) -> None:
        self.waited = self.total = 0.0

    def on_step_end(self, step: StepInfo) -> None:
        if step.global_step > 1:
            self.waited += step.wait_seconds
            self.total += step.seconds


def waiting(splits: tuple[UncachedSplit, UncachedSplit], processes: int) -> float:
    """The share of an epoch of training in which steps waited for data actors."""
    experiment = Experiment(
        data=DataConfig(name="cityscapes", height=128, width=256, augment=True),
        model=ModelConfig(encoder="test_efficientnet", head="linear"),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.001),
        epochs=1,
        batch_size=BATCH_SIZE,
    )
    loader = loader_of(splits, processes, 1)
    train, evaluation = (
        Split(
            streams=part.streams,
            rows={stream.name: part.rows(stream) for stream in part.streams},
            loader=loader,
        )
        for part in splits
    )
    waits = Waiting()
    loop.run(experiment, train=train, evaluation=evaluation, callbacks=[waits])
    loader.close()
    return waits.waited / waits.total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", nargs="+", choices=("light", "decode"), default=["light", "decode"]
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="measured (default: %(default)s)")
    parser.add_argument("--light-samples", type=int, default=512)
    parser.add_argument("--decode-samples", type=int, default=64)
    arguments = parser.parse_args()
    cluster.connect(num_cpus=1 + max(arguments.processes))
    print(
        "| work | processes | DataLoader /s | data actors /s | ratio | first batch, s | waiting |"
    )
    print("|---|---|---|---|---|---|---|")
    for work in arguments.work:
        with tempfile.TemporaryDirectory() as folder:
            splits, dataset = prepared(work, Path(folder), arguments)
            for processes in arguments.processes:
                print(row(work, splits, dataset, processes, arguments.epochs), flush=True)


def prepared(
    work: str, folder: Path, arguments: argparse.Namespace
) -> tuple[tuple[UncachedSplit, UncachedSplit], Dataset]:
    """The samples as data actors read them, and the same for a DataLoader."""
    if work == "decode":
        write_official(folder, arguments.decode_samples)
        data = DataConfig(
            name="cityscapes", path=str(folder), form="official", height=128, width=256
        )
    else:
        write_frames(folder / "npy", arguments.light_samples, 128, 256)
        files = DataConfig(name="cityscapes", path=str(folder / "npy"))
        streams = {split: open_streams(files, split) for split in ("train", "val")}
        prepare(streams, str(folder / "shards"), name="cityscapes", source={"path": "frames"})
        data = DataConfig(name="cityscapes", path=str(folder / "shards"))
    train, evaluation = (check_streams(open_streams(data, split)) for split in ("train", "val"))
    (stream,) = train.streams
    dataset: Dataset = Decoded(stream) if work == "decode" else Frames(folder / "npy", stream)
    return (train, evaluation), dataset


def row(
    work: str,
    splits: tuple[UncachedSplit, UncachedSplit],
    dataset: Dataset,
    processes: int,
    epochs: int,
) -> str:
    """One line of the table; the two loaders take turns."""
    rates: dict[str, list[float]] = {"torch": [], "ray": []}
    firsts: dict[str, list[float]] = {"torch": [], "ray": []}
    for _ in range(2):
        first, found = measured(torch_epochs(dataset, splits[0].streams[0], processes), epochs)
        rates["torch"] += found
        firsts["torch"].append(first)
        loader = loader_of(splits, processes, epochs + 1)
        first, found = measured(ray_epochs(loader), epochs)
        loader.close()
        rates["ray"] += found
        firsts["ray"].append(first)
    torch_rate, ray_rate = (statistics.median(found) for found in rates.values())
    torch_first, ray_first = (statistics.median(found) for found in firsts.values())
    return (
        f"| {work} | {processes} | {torch_rate:.0f} | {ray_rate:.0f} | {ray_rate / torch_rate:.2f} | "
        f"{torch_first:.1f}, {ray_first:.1f} | {100 * waiting(splits, processes):.1f} % |"
    )


if __name__ == "__main__":
    main()
