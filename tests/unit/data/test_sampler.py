"""Rows of the same class across domains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repmtl_ray.collectives import ALONE, Workers
from repmtl_ray.config import DataConfig, Experiment
from repmtl_ray.data.batches import LocalRows, train_batches
from repmtl_ray.data.sampler import align_task_rows
from repmtl_ray.data.sources import Stream, open_streams
from repmtl_ray.runs import loop
from tests.helpers.layouts import domain_stream, make_office


def stream(name: str, num_samples: int, num_classes: int) -> Stream:
    """Sample i is of class i modulo num_classes, in the stream's list and when it is loaded."""
    made = domain_stream(name, num_samples)

    def load(index: int) -> dict[str, Any]:
        return {**made.load(index), name: np.array(index % num_classes)}

    return replace(made, load=load, classes=tuple(i % num_classes for i in range(num_samples)))


STREAMS = (stream("dslr", 7, 3), stream("amazon", 20, 3), stream("webcam", 9, 3))


def train(
    streams: Any = STREAMS, *, workers: Any = ALONE, tasks: Any = None, **options: Any
) -> list[Any]:
    rows = {each.name: LocalRows(each) for each in streams}
    options = {
        "batch_size": 4,
        "seed": 1,
        "epoch": 0,
        "augment": True,
        "pairing": "class",
    } | options
    tasks = tasks or [each.name for each in streams]
    return list(
        train_batches(streams, rows, tasks=tasks, workers=workers, dtype=torch.float32, **options)
    )


def ids(batches: Any, task: Any) -> Any:
    return torch.cat([batch.sample_ids[batch.rows[task]] for batch in batches]).tolist()


def test_every_row_of_a_batch_shows_one_class_in_all_domains() -> None:
    batches = train()
    assert len(batches) == 5
    for batch in batches:
        assert torch.equal(batch.targets["dslr"], batch.targets["amazon"])
        assert torch.equal(batch.targets["webcam"], batch.targets["amazon"])
    positional = train(pairing="position")
    assert any(not torch.equal(b.targets["dslr"], b.targets["amazon"]) for b in positional)
    assert ids(batches, "amazon") == ids(positional, "amazon")  # the longest keeps its order


def test_samples_of_a_class_are_used_equally_often_give_or_take_one() -> None:
    batches = train()
    assert sorted(ids(batches, "amazon")) == list(range(20))
    for name, num_samples in (("dslr", 7), ("webcam", 9)):
        used = Counter(ids(batches, name))
        for label in range(3):
            times = [used[sample] for sample in range(label, num_samples, 3)]
            assert max(times) - min(times) <= 1, (name, label, times)


def test_a_sample_comes_at_most_once_where_the_class_counts_allow() -> None:
    anchor = np.random.default_rng(0).permutation(9)  # three of each class
    order = align_task_rows(STREAMS, anchor, seed=0, epoch=0)
    for name, (samples, laps) in order.items():
        once = samples[laps == 0]
        assert len(set(once.tolist())) == len(once), name
    assert order["webcam"][1].max() == 0  # it has three of each


@pytest.mark.parametrize("num_workers", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(num_workers: int) -> None:
    alone = train()
    shares = [train(workers=Workers(rank, num_workers)) for rank in range(num_workers)]
    for step, batch in enumerate(alone):
        for task in ("dslr", "amazon", "webcam"):
            images = [share[step].images[share[step].rows[task]] for share in shares]
            assert torch.equal(torch.cat(images), batch.images[batch.rows[task]])


def test_the_order_follows_seed_and_epoch_alone() -> None:
    orders = [
        ids(train(**options), "webcam")
        for options in ({}, {}, {"epoch": 1}, {"seed": 2}, {"augment": False})
    ]
    assert orders[0] == orders[1] == orders[4]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_a_task_alone_sees_the_samples_that_it_sees_with_the_others() -> None:
    assert ids(train(tasks=["dslr"]), "dslr") == ids(train(), "dslr")


def test_interrupted_epochs_go_on_with_the_same_rows() -> None:
    assert ids(train(first_step=3), "dslr") == ids(train(), "dslr")[12:]


def test_streams_that_cannot_be_paired_are_refused_before_training(tmp_path: Path) -> None:
    make_office(tmp_path, per_class={"amazon": 6, "dslr": 4}, classes={"mug": 0, "bike": 4})
    data = DataConfig(
        name="office31", path=str(tmp_path), domains=("amazon", "dslr"), pairing="class"
    )
    experiment = Experiment(data=data, batch_size=4)
    assert loop.num_steps(experiment, open_streams(data, "train")) == 2
    lists = tmp_path / "splits/dslr_train.txt"
    lines = lists.read_text().splitlines()
    lists.write_text("\n".join(line for line in lines if not line.endswith(" 4")))
    with pytest.raises(ValueError, match=r"dslr has no training sample of class 4, of which amaz"):
        loop.num_steps(experiment, open_streams(data, "train"))
    with pytest.raises(ValueError, match="amazon does not know its samples' classes"):
        loop.num_steps(experiment, [domain_stream("amazon", 9)])
