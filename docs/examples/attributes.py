"""Forty yes-or-no attributes of a picture, as CelebA has of a face; the pictures are rendered.

Each attribute is a task. Run it: python docs/examples/attributes.py
"""

import numpy as np
import pandas
from torch import nn

from repmtl_ray import CustomData, DataConfig, Experiment, Model, OptimizerConfig, RegularizerConfig
from repmtl_ray.tasks import Binary

NUM_ATTRIBUTES = 40
TASKS = tuple(Binary(name=f"has_{k}", measures=("accuracy",)) for k in range(NUM_ATTRIBUTES))
INPUTS = ("image",)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    regularizer=RegularizerConfig(lambda_tsr=0.0, lambda_csa=0.0),  # no penalties
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
    epochs=6,
    batch_size=100,
)


def rows(count, seed):
    """Pictures of 32 x 40 in 5 x 8 cells: an attribute gives its cell its colour."""
    rng = np.random.default_rng(seed)
    colors = np.random.default_rng(0).integers(0, 256, (NUM_ATTRIBUTES, 3))
    has = rng.random((count, NUM_ATTRIBUTES)) < np.linspace(0.2, 0.8, NUM_ATTRIBUTES)
    pictures = rng.integers(96, 160, (count, 32, 40, 3))
    for k in range(NUM_ATTRIBUTES):
        top, left = 4 * (k // 5), 8 * (k % 5)
        pictures[has[:, k], top : top + 4, left : left + 8] = colors[k]
    frame = pandas.DataFrame({"sample_id": np.arange(count)})
    frame["image"] = list(pictures.astype(np.uint8))
    labels = {f"has_{k}": has[:, k].astype(int) for k in range(NUM_ATTRIBUTES)}
    return frame.assign(**labels)


def model():
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 10, 96),
        nn.Tanh(),
    )
    return Model(encoder=encoder, heads={task.name: nn.Linear(96, 1) for task in TASKS})


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    data = CustomData(
        train=ray.data.from_items(rows(800, seed=1).to_dict("records")),
        evaluation=ray.data.from_items(rows(300, seed=2).to_dict("records")),
        inputs=INPUTS,
        tasks=TASKS,
    )
    metrics = fit(EXPERIMENT, model=model, data=data).metrics
    print(f"mean accuracy {np.mean([metrics[f'{t.name}/accuracy'] for t in TASKS]):.1f} %")
