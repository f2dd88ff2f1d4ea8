"""A worker whose batches data actors make on nodes that come and go, in a process of its own.

python -m tests.helpers.data_nodes FOLDER EPOCHS

Every sample leaves a file in FOLDER, whose name begins with the id of the node that read it. Prints how
many batches came, all equal to those of this process's own threads.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import torch

from repmtl_ray import cluster
from repmtl_ray.collectives import ALONE
from repmtl_ray.data import ray_pipeline
from repmtl_ray.data.batches import planned_batches, planned_eval_batches
from repmtl_ray.data.cache import UncachedSplit
from repmtl_ray.data.data_actor import RunBatches
from repmtl_ray.data.plan import EvalPlan, TrainPlan
from repmtl_ray.data.ray_pipeline import RayLoader
from repmtl_ray.data.stream import Sample, Stream
from tests.helpers.layouts import dense_stream

STREAM = dense_stream(16)
PAUSE_S = 0.1


@dataclass(frozen=True)
class Noted:
    """Loads samples of `STREAM`, and notes on which node."""

    folder: Path

    def __call__(self, index: int) -> Sample:
        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{node}-{index}-{time.monotonic_ns()}").touch()
        return STREAM.load(index)


def readers(folder: Path) -> list[str]:
    """The nodes that read samples, in the order in which they began."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return list(dict.fromkeys(file.name.partition("-")[0] for file in files))


def split(*streams: Stream) -> UncachedSplit:
    return UncachedSplit(streams=streams, num_bytes=1, fingerprint="", labelled=frozenset())


def main(folder: str, epochs: int) -> None:
    cluster.connect()
    ray_pipeline.MAX_TASK_BATCHES = 1
    shared: dict[str, Any] = {"tasks": STREAM.tasks, "batch_size": 4, "workers": ALONE}
    noted = split(replace(STREAM, load=Noted(Path(folder))))
    evaluation = split(dense_stream(6))
    batches = RunBatches(
        train=TrainPlan(streams=noted.streams, seed=3, augment=True, **shared),
        evaluation=EvalPlan(streams=evaluation.streams, **shared),
        train_split=noted,
        eval_split=evaluation,
    )
    loader = RayLoader(batches, num_epochs=epochs, num_actors=1, timeout_s=200)
    own = {STREAM.name: split(STREAM).rows(STREAM)}
    own_eval = {STREAM.name: evaluation.rows(evaluation.streams[0])}
    count = 0
    for epoch in range(epochs):
        options: dict[str, Any] = {"epoch": epoch, "dtype": torch.float32}
        plans = batches.train, batches.evaluation
        found = chain(
            planned_batches(plans[0], {}, **options, loader=loader),
            planned_eval_batches(plans[1], {}, **options, loader=loader),
        )
        expected = chain(
            planned_batches(plans[0], own, **options),
            planned_eval_batches(plans[1], own_eval, **options),
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.sample_ids, other.sample_ids)
            assert all(torch.equal(one.targets[t], other.targets[t]) for t in STREAM.tasks)
            count += 1
            time.sleep(PAUSE_S)
    loader.close()
    print(f"{count} equal batches", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
