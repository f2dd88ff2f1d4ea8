"""Eleven numbers a row, as QM9 has of every molecule, from a table of descriptors.

Each number is a task of its own, in its own unit. Run it: python docs/examples/molecules.py
"""

import numpy as np
import pandas
from torch import nn

from repmtl_ray import (
    CustomData,
    DataConfig,
    Experiment,
    Model,
    OptimizerConfig,
    PolicyConfig,
    RegularizerConfig,
)
from repmtl_ray.tasks import Regression

NUM_TARGETS, NUM_DESCRIPTORS = 11, 24
TASKS = tuple(Regression(name=f"target_{k}", loss="l1") for k in range(NUM_TARGETS))
INPUTS = ("descriptors",)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    policy=PolicyConfig(name="EW"),  # on log losses, which take the units out
    regularizer=RegularizerConfig(share=0.1),  # bounds Rep-MTL's penalties
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.0),
    epochs=6,
    batch_size=128,
)


def rows(count, seed):
    """Targets are smooth functions of six hidden factors, in units from 0.1 to 10."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    mix = fixed.normal(size=(6, NUM_DESCRIPTORS)) / 6**0.5
    weights = fixed.normal(size=(6, NUM_TARGETS))
    factors = rng.normal(size=(count, 6))
    frame = pandas.DataFrame({"sample_id": np.arange(count)})
    frame["descriptors"] = list((factors @ mix).astype(np.float32))
    values = np.tanh(factors @ weights) + 0.3 * (factors**2) @ weights
    for k, unit in enumerate(np.geomspace(0.1, 10, NUM_TARGETS)):
        frame[f"target_{k}"] = (unit * values[:, k]).astype(np.float32)
    return frame


def model():
    encoder = nn.Sequential(
        nn.Linear(NUM_DESCRIPTORS, 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, 64),
    )
    heads = {task.name: nn.Sequential(nn.SiLU(), nn.Linear(64, 1)) for task in TASKS}
    return Model(encoder=encoder, heads=heads)


def spread(frame):
    """What the mean of each target is wrong by: a model must be better."""
    return {
        f"{t.name}/abs_error": (frame[t.name] - frame[t.name].mean()).abs().mean() for t in TASKS
    }


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    evaluation = rows(1_000, seed=2)
    data = CustomData(
        train=ray.data.from_pandas(rows(8_000, seed=1)),
        evaluation=ray.data.from_pandas(evaluation),
        inputs=INPUTS,
        tasks=TASKS,
    )
    metrics = fit(EXPERIMENT, model=model, data=data).metrics
    for name, value in spread(evaluation).items():
        print(f"{name}: {metrics[name]:.3f}; the mean has {value:.3f}")
