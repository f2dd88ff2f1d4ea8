"""How many samples per second arrive at the model, compared with a torch DataLoader; how long training waits.

    python -m bench.data [--samples 1024] [--height 128 --width 256] [--repeats 3] [--s3 URI]

Makes frames in the Cityscapes npy layout (random images, labels in blocks, depths with holes) and
prepares them as shards. Then reads them in batches of 16 with augmentation from Ray's object store,
from shards on disk, from npy files, from shards in a bucket, and with Ray Data's own pipeline over
the same shards. The bucket is that of `--s3`, or one of moto's server, which is a process of its own
on the same cores. The DataLoader does the same work on the same cores: plain `numpy.load`, the same
augmentation and collation, one process per core. Every epoch has another order. The first epoch opens
the files and is not counted. A rate is the median of the repeats; the sources take turns.

After that, one epoch of training on the CPU runs from each source, and the share of its time in which
the loop waited for a batch is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import ray
import torch
from pyarrow import parquet
from torch.utils.data import DataLoader, Dataset

from repmtl_ray import cluster
from repmtl_ray.collectives import ALONE
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.data.augment import augment
from repmtl_ray.data.batches import Rows, train_batches
from repmtl_ray.data.cache import cache_streams
from repmtl_ray.data.collate import collate
from repmtl_ray.data.prepare import prepare
from repmtl_ray.data.sources import Stream, open_streams
from repmtl_ray.data.storage_rows import StorageRows
from repmtl_ray.runs import loop

BATCH_SIZE = 16
TASKS = ("segmentation", "depth")
S3_SERVER = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


def write_frames(root: Path, num_samples: int, height: int, width: int) -> None:
    """Writes the training frames and one validation frame."""
    for split, count in (("train", num_samples), ("val", 1)):
        for part in ("image", "label_7", "depth"):
            (root / split / part).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([index, count])
            blocks = rng.integers(-1, 7, (height // 8, width // 8)).astype(np.int16)
            depth = rng.random((height, width, 1), dtype=np.float32) * np.float32(0.49)
            depth[rng.random((height // 8, width // 8)).repeat(8, 0).repeat(8, 1) < 0.4] = 0
            image = rng.random((height, width, 3), dtype=np.float32)
            np.save(root / split / "image" / f"{index}.npy", image)
            np.save(root / split / "label_7" / f"{index}.npy", blocks.repeat(8, 0).repeat(8, 1))
            np.save(root / split / "depth" / f"{index}.npy", depth)


class Frames(Dataset):
    """The data set of a user of torch alone: npy files, augmented when they are read."""

    def __init__(self, root: Path, stream: Stream) -> None:
        self.root = root / "train"
        self.num_samples = stream.num_samples
        self.kinds = {"image": "image", **stream.kinds}
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {
            "sample_id": np.array(index),
            "image": np.load(self.root / "image" / f"{index}.npy"),
            "segmentation": np.load(self.root / "label_7" / f"{index}.npy"),
            "depth": np.load(self.root / "depth" / f"{index}.npy"),
        }
        rng = np.random.default_rng([0, self.epoch, 0, 0, index])
        return augment(sample, rng=rng, kinds=self.kinds)


class Collate:
    """Makes the same batches as this project."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        stacked = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        batch = collate([(self.stream, stacked)], TASKS, torch.float32)
        return batch.images, dict(batch.targets), batch.sample_ids


def _nothing(index: int) -> dict[str, np.ndarray]:
    raise NotImplementedError(index)


def data_loader(root: Path, stream: Stream) -> Callable[[int], Iterator[Any]]:
    bare = replace(stream, load=_nothing)  # the workers need only its kinds
    loader = DataLoader(
        Frames(root, stream),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count() or 1,
        collate_fn=Collate(bare),
        persistent_workers=True,
        multiprocessing_context="spawn",  # this process has Ray's threads
    )
    return lambda _epoch: iter(loader)


def ours(stream: Stream, rows: Rows) -> Callable[[int], Iterator[Any]]:
    return lambda epoch: train_batches(
        (stream,),
        {stream.name: rows},
        tasks=TASKS,
        batch_size=BATCH_SIZE,
        seed=0,
        epoch=epoch,
        workers=ALONE,
        augment=True,
        dtype=torch.float32,
    )


def ray_data(root: Path, stream: Stream) -> Callable[[int], Iterator[Any]]:
    """Ray Data's own pipeline over the same shards, as its guides have it: files in random order, a
    task that decodes and augments, a shuffle buffer on the way to batches."""
    files = sorted(str(path) for path in (root / "train").glob("*.parquet"))
    schema = parquet.read_schema(files[0])
    forms = {
        name: (schema.field(name).metadata[b"dtype"].decode(), json.loads(form))
        for name in schema.names
        if (form := (schema.field(name).metadata or {}).get(b"shape"))
    }
    kinds = {"image": "image", **stream.kinds}

    def augmented(table: pyarrow.Table, number: int) -> dict[str, np.ndarray]:
        samples = []
        for row in table.to_pylist():
            sample = {
                name: np.frombuffer(row[name], dtype).reshape(shape)
                for name, (dtype, shape) in forms.items()
            }
            sample["sample_id"] = np.array(row["sample_id"])
            rng = np.random.default_rng([0, number, 0, 0, row["sample_id"]])
            samples.append(augment(sample, rng=rng, kinds=kinds))
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def epoch(number: int) -> Iterator[Any]:
        read: Any = ray.data.read_parquet(files, shuffle="files")
        views = read.map_batches(
            augmented, batch_size=BATCH_SIZE, batch_format="pyarrow", fn_kwargs={"number": number}
        )
        for samples in views.iter_batches(
            batch_size=BATCH_SIZE, drop_last=True, local_shuffle_buffer_size=8 * BATCH_SIZE
        ):
            yield collate([(stream, samples)], TASKS, torch.float32)

    return epoch


def rate(epoch: Callable[[int], Iterator[Any]], number: int, num_samples: int) -> float:
    """Samples per second over one epoch."""
    start = time.perf_counter()
    seen = sum(1 for _ in epoch(number)) * BATCH_SIZE
    assert seen == num_samples // BATCH_SIZE * BATCH_SIZE
    return seen / (time.perf_counter() - start)


def waiting_share(experiment: Experiment, stream: Stream, rows: Rows) -> tuple[float, float]:
    """Of one epoch of training: the share of time without a batch, and milliseconds a step."""
    waited, num_steps, total = 0.0, 0, 0.0

    def timed(*args: Any, **options: Any) -> Iterator[Any]:
        nonlocal waited, num_steps, total
        batches = train_batches(*args, **options)
        begin = time.perf_counter()
        next_batch = next(batches, None)  # the threads start: part of an epoch, not of a step
        first = time.perf_counter()
        while next_batch is not None:
            yield next_batch
            num_steps += 1
            asked = time.perf_counter()
            next_batch = next(batches, None)
            waited += time.perf_counter() - asked
        total = time.perf_counter() - first
        waited += first - begin
        total += first - begin

    split = loop.Split(streams=(stream,), rows={stream.name: rows})
    one = np.arange(1)
    val = loop.Split(
        streams=(Stream(name=stream.name, kinds=stream.kinds, num_samples=1, load=stream.load),),
        rows={stream.name: _First(rows.fetch(one))},
    )
    with mock.patch.object(loop, "train_batches", timed):
        loop.run(experiment, train=split, evaluation=val)
    return waited / total, 1000 * total / num_steps


class _First:
    """The first sample alone, for the evaluation."""

    def __init__(self, sample: dict[str, Any]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 1

    def fetch(self, indices: Any, columns: Any = None) -> dict[str, Any]:
        return {name: self.sample[name].copy() for name in columns or self.sample}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URI of a folder in a bucket, on a server that runs on this machine."""
    import boto3

    server = subprocess.Popen(
        [sys.executable, "-c", S3_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        host, port = server.stdout.readline().split()
        boto3.client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1"
        ).create_bucket(Bucket="bench")
        yield f"s3://bench/shards?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoder", default="test_efficientnet", help="of the training that waits")
    parser.add_argument(
        "--s3",
        metavar="URI",
        help="an empty place in a bucket; credentials as always (default: a server is started)",
    )
    arguments = parser.parse_args()
    if arguments.s3 is None:
        os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    cluster.connect()
    given = s3_server() if arguments.s3 is None else contextlib.nullcontext(arguments.s3)
    with tempfile.TemporaryDirectory() as folder, given as uri:
        measure(Path(folder), uri, arguments)


def measure(folder: Path, uri: str, arguments: argparse.Namespace) -> None:
    write_frames(folder / "npy", arguments.samples, arguments.height, arguments.width)
    npy = DataConfig(name="cityscapes", path=str(folder / "npy"))
    streams = {split: open_streams(npy, split) for split in ("train", "val")}
    for out in (str(folder / "shards"), uri):
        start = time.perf_counter()
        prepare(streams, out, name="cityscapes", source={"path": npy.path})
        print(
            f"prepared {out.partition('?')[0]}: {arguments.samples} samples in {time.perf_counter() - start:.1f} s"
        )
    (files,) = streams["train"]
    (stored,) = open_streams(DataConfig(name="cityscapes", path=str(folder / "shards")), "train")
    (remote,) = open_streams(DataConfig(name="cityscapes", path=uri), "train")
    cached = cache_streams((stored,))
    rows: dict[str, tuple[Stream, Rows]] = {
        "Ray's object store": (stored, cached.rows(stored)),
        "shards on disk": (stored, StorageRows(stored)),
        "npy files": (files, StorageRows(files)),
        "shards in S3": (remote, StorageRows(remote)),
    }
    ways = {name: ours(stream, found) for name, (stream, found) in rows.items()}
    ways = {
        "torch DataLoader (npy)": data_loader(folder / "npy", files),
        "Ray Data's own pipeline (shards on disk)": ray_data(folder / "shards", stored),
        **ways,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, epoch in ways.items():
            samples_per_s = rate(epoch, repeat, arguments.samples)
            if repeat:
                rates[name].append(samples_per_s)
    reference = statistics.median(rates["torch DataLoader (npy)"])
    print("\n| from | samples/s | of the DataLoader's |\n|---|---|---|")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.0f} | {middle / reference:.2f} |")
    experiment = Experiment(
        data=DataConfig(
            name="cityscapes", height=arguments.height, width=arguments.width, augment=True
        ),
        model=ModelConfig(encoder=arguments.encoder, head="linear"),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.001),
        epochs=1,
        batch_size=BATCH_SIZE,
    )
    print(f"\n| training {arguments.encoder} from | ms a step | waiting |\n|---|---|---|")
    for name, (stream, found_rows) in rows.items():
        share, step = waiting_share(experiment, stream, found_rows)
        print(f"| {name} | {step:.0f} | {100 * share:.1f} % |")


if __name__ == "__main__":
    main()
