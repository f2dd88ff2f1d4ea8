"""Every method on a problem whose runs take seconds, with an equal tuning budget.

    python -m bench.methods --minutes 60
    python -m bench.methods --photographs DIR    # three domains of Office-31, see bench/office.py
    python -m bench.methods --heads --seeds 5    # what weighted heads change, for the methods that weigh them

The problem is a generated one: users and items have hidden vectors. Tasks: click; buy and minutes of
whoever clicked, so most rows lack these labels. What makes a user click is partly what makes the visit
short, so tasks conflict. Every method chooses among three factors of the learning rate, --rates (tuned
weights among three weights), without a fifth of the training rows, then trains with three seeds. A run
takes seconds; the same command goes on where it stopped, and prints what there is.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import office
from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig, replace
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.columns import SAMPLE_ID
from repmtl_ray.data.stream import Sample, Stream
from repmtl_ray.models.own import Model
from repmtl_ray.runs.build import Split
from repmtl_ray.studies.methods import method
from repmtl_ray.studies.recommend import compare_methods, every_method
from repmtl_ray.studies.rep_mtl import Row, as_markdown, compare, spread, train_row
from repmtl_ray.tasks import Binary, Regression, Task

TASKS: tuple[Task, ...] = (
    Binary(name="click"),
    Binary(name="buy"),
    Regression(name="minutes", loss="huber"),
)
NUM_USERS, NUM_ITEMS, NUM_TRAIN, NUM_EVAL = 80, 60, 1200, 600
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    model=ModelConfig(encoder="custom", code="bench.methods"),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    epochs=5,
    batch_size=100,
)

METRICS = ("click/auc", "buy/auc", "minutes/abs_error")
WEIGHING = ("ExcessMTL", "IMTL", "MGDA", "Nash-MTL")
"""Methods whose official code trains the heads on weighted losses too (PIVRG, which needs losses of
single tasks, is left out)."""


class Towers(nn.Module):
    """Vectors of a user and an item beside a price, to [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(NUM_USERS, 8), nn.Embedding(NUM_ITEMS, 8)
        self.body = nn.Sequential(nn.Linear(25, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh())

    def forward(self, user: Tensor, item: Tensor, price: Tensor) -> Tensor:
        u, i = self.user(user), self.item(item)
        return self.body(torch.cat([u, i, u * i, price[:, None]], dim=1))


def make_model() -> Model:
    """A linear head for every task."""
    return Model(encoder=Towers(), heads={task.name: nn.Linear(16, 1) for task in TASKS})


def samples(count: int, seed: int) -> list[Sample]:
    """Rows of one world: its users and items are the same for every seed."""
    world, rng = np.random.default_rng(7), np.random.default_rng([7, seed])
    users, items = world.normal(size=(NUM_USERS, 3)), world.normal(size=(NUM_ITEMS, 3))
    bait, value = world.normal(size=NUM_ITEMS), world.normal(size=NUM_ITEMS)

    def chance(score: float) -> bool:
        return bool(rng.random() < 1 / (1 + np.exp(-score)))

    rows = []
    for number in range(count):
        user, item, price = rng.integers(NUM_USERS), rng.integers(NUM_ITEMS), rng.random()
        fit = float(users[user] @ items[item])
        click = chance(fit + 1.5 * bait[item] - price)
        minutes = np.log1p(np.exp(0.5 * fit - bait[item] + rng.normal(scale=0.3)))
        buy = chance(fit + value[item] - 3 * price) if click else -1
        row: dict[str, Any] = {
            SAMPLE_ID: np.int64(number),
            "user": np.int64(user),
            "item": np.int64(item),
            "price": np.float32(price),
            "click": np.int64(click),
            "buy": np.int64(buy),
            "minutes": np.float32(minutes if click else np.nan),
        }
        rows.append({name: np.asarray(value) for name, value in row.items()})
    return rows


def split_of(count: int, seed: int) -> Split:
    """Rows as the loop takes them, in this process."""
    rows = samples(count, seed)
    stream = Stream(
        name="custom",
        kinds={task.name: task.kind for task in TASKS},
        num_samples=count,
        load=rows.__getitem__,
        inputs=("user", "item", "price"),
    )
    return Split(
        streams=(stream,), rows={"custom": LocalRows(stream)}, tasks=TASKS, make_model=make_model
    )


def heads_table(splits: Mapping[str, Split], seeds: Sequence[int]) -> list[list[str]]:
    """Weighted heads, as in the official codes, against heads of weight 1, in pairs of equal seed."""
    names = list(METRICS)
    table = [["method", "heads", *names, "delta_p, weighted - 1"]]
    for name in WEIGHING:
        rows: list[Row] = []
        for seed, heads in itertools.product(seeds, ("official", "one")):
            changes = {"seed": seed, **method(name), "policy.arguments": {"head_weights": heads}}
            rows.append(train_row(heads, replace(EXPERIMENT, changes), splits, "cpu", data=""))
        difference = compare(rows, "official", "one", baseline="one")
        assert difference is not None
        deviation = 0.0 if difference.deviation is None else difference.deviation
        for heads, last in (("one", ""), ("official", f"{difference.mean:+.2f} ± {deviation:.2f}")):
            own = [row.metrics for row in rows if row.variant == heads]
            means = [spread([metrics[metric] for metrics in own]) for metric in names]
            table.append([name, heads, *means, last])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 1.0, 3.0])
    parser.add_argument("--out", default="results")
    parser.add_argument("--heads", action="store_true", help="compare weights of heads instead")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="of Office-31, instead")
    arguments = parser.parse_args()
    if arguments.photographs:
        experiment, file = office.EXPERIMENT, "methods-office.jsonl"
        train = office.split_of(arguments.photographs, "train")
        evaluation = office.split_of(arguments.photographs, "test")
    else:
        experiment, file = EXPERIMENT, "methods.jsonl"
        train, evaluation = split_of(NUM_TRAIN, 1), split_of(NUM_EVAL, 2)
    splits = {"train": train, experiment.data.eval_split: evaluation}
    if arguments.heads:
        if arguments.photographs:
            parser.error("--heads compares on the generated problem alone")
        print(as_markdown(heads_table(splits, range(arguments.seeds))))
        return
    found = compare_methods(
        experiment,
        splits,
        minutes=arguments.minutes,
        seeds=range(arguments.seeds),
        names=arguments.methods or every_method(len(train.tasks or ())),
        draws=3,
        rates=arguments.rates,
        file=Path(arguments.out) / file,
    )
    print(f"\n{found}")


if __name__ == "__main__":
    main()
