"""Who clicks, and who of them buys: two towers on 200,000 generated impressions.

The process is known, so the table ends with what no model can beat: the area under the ROC curve of
the true probabilities. Run it: python docs/examples/recommendation.py
"""

import numpy as np
import pandas
import torch
from torch import nn

from repmtl_ray import CustomData, DataConfig, Experiment, Model, OptimizerConfig, RegularizerConfig
from repmtl_ray.tasks import Binary

NUM_USERS, NUM_ITEMS, NUM_TRAITS = 100, 80, 3
TASKS = (Binary(name="click"), Binary(name="buy"))
INPUTS = ("user", "item", "price")
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    regularizer=RegularizerConfig(share=0.1),  # bounds Rep-MTL's penalties
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
    epochs=2,
    batch_size=1024,
)


def rows(count, seed):
    """Users and items have traits, which also make them active and popular; a high price is a bar."""
    traits = np.random.default_rng(0).normal(size=(2, 100, NUM_TRAITS))
    rng = np.random.default_rng(seed)
    frame = pandas.DataFrame({"sample_id": np.arange(count)})
    frame["user"], frame["item"] = (
        rng.integers(NUM_USERS, size=count),
        rng.integers(NUM_ITEMS, size=count),
    )
    frame["price"] = rng.random(count, dtype=np.float32)
    liking = (traits[0, frame["user"]].sum(axis=1) + traits[1, frame["item"]].sum(axis=1)) / 2
    fit = (
        liking + (traits[0, frame["user"]] * traits[1, frame["item"]]).sum(axis=1) / NUM_TRAITS**0.5
    )
    frame["p_click"] = 1 / (1 + np.exp(1 - fit))
    frame["p_buy"] = 1 / (1 + np.exp(4 * frame["price"] - 1 - fit))  # of those who click
    frame["click"] = (rng.random(count) < frame["p_click"]).astype(int)
    frame["buy"] = np.where(frame["click"], rng.random(count) < frame["p_buy"], np.nan)
    return frame


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(NUM_USERS, 16), nn.Embedding(NUM_ITEMS, 16)
        self.body = nn.Sequential(nn.Linear(49, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())

    def forward(self, user, item, price):
        u, i = self.user(user), self.item(item)
        return self.body(torch.cat([u, i, u * i, price[:, None]], dim=1))


def model():
    return Model(encoder=Towers(), heads={task.name: nn.Linear(32, 1) for task in TASKS})


def best(frame):
    """The areas under the ROC curve of the true probabilities, in percent."""
    found = {}
    for task in TASKS:
        known = frame[frame[task.name].notna()]
        ranks = known[f"p_{task.name}"].rank()
        ones = known[task.name] == 1
        above = ranks[ones].sum() - ones.sum() * (ones.sum() + 1) / 2
        found[f"{task.name}/auc"] = 100 * above / (ones.sum() * (~ones).sum())
    return found


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    train, evaluation = rows(200_000, seed=1), rows(20_000, seed=2)
    data = CustomData(
        train=ray.data.from_pandas(train),
        evaluation=ray.data.from_pandas(evaluation),
        inputs=INPUTS,
        tasks=TASKS,
    )
    metrics = fit(EXPERIMENT, model=model, data=data).metrics
    for name, value in best(evaluation).items():
        print(f"{name}: {metrics[name]:.1f}; the true probabilities have {value:.1f}")
