"""Own data of which most labels are missing, and a loss and metrics of one's own.

Of every patient the dose was measured in a quarter, the response in a half, both in few. Run it:
python docs/examples/missing_labels.py
"""

import numpy as np
import pandas
import torch
from torch import nn

from repmtl_ray import (
    CustomData,
    CustomTask,
    DataConfig,
    Experiment,
    Model,
    OptimizerConfig,
    RegularizerConfig,
)
from repmtl_ray.tasks import Binary


def pinball(prediction, target):
    """The loss of the 90 % quantile; samples without a label never come here."""
    error = target - prediction
    return torch.maximum(0.9 * error, -0.1 * error)


TASKS = (
    CustomTask(name="dose", loss=pinball, measures={"pinball_down": pinball}),
    Binary(name="response"),
)
INPUTS = ("values",)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    regularizer=RegularizerConfig(share=0.1),  # bounds Rep-MTL's penalties
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    epochs=5,
    batch_size=128,
)


def rows(count, seed):
    """Two factors of eight values decide the dose, with noise, and the response."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 8))
    factors = values @ np.random.default_rng(0).normal(size=(8, 2)) / 8**0.5
    dose = np.abs(factors).sum(axis=1) + 0.2 * rng.normal(size=count)
    response = rng.random(count) < 1 / (1 + np.exp(-3 * factors[:, 0]))
    frame = pandas.DataFrame({"sample_id": np.arange(count)})
    frame["values"] = list(values.astype(np.float32))
    frame["dose"] = np.where(rng.random(count) < 0.25, dose, np.nan).astype(np.float32)
    frame["response"] = np.where(rng.random(count) < 0.5, response, np.nan)
    return frame


def model():
    encoder = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU())
    return Model(encoder=encoder, heads={task.name: nn.Linear(32, 1) for task in TASKS})


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    data = CustomData(
        train=ray.data.from_pandas(rows(8_000, seed=1)),
        evaluation=ray.data.from_pandas(rows(2_000, seed=2)),
        inputs=INPUTS,
        tasks=TASKS,
    )
    print(fit(EXPERIMENT, model=model, data=data).metrics)
