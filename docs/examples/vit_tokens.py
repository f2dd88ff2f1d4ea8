"""A vision transformer whose tokens are the representation: where a square is, and how large.

The encoder gives [B, N, C], so saliency is per token. Run it: python docs/examples/vit_tokens.py
"""

import numpy as np
import pandas
import timm
from torch import nn

from repmtl_ray import (
    Classification,
    CustomData,
    DataConfig,
    Experiment,
    Model,
    OptimizerConfig,
    PolicyConfig,
    RegularizerConfig,
)
from repmtl_ray.tasks import Regression

TASKS = (Classification(name="quadrant", num_classes=4, top_k=2), Regression(name="side"))
INPUTS = ("image",)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    policy=PolicyConfig(log_losses=False),  # all labels can be found: losses come near 0
    regularizer=RegularizerConfig(share=0.1),  # bounds Rep-MTL's penalties
    optimizer=OptimizerConfig(learning_rate=3e-3),
    epochs=3,
    batch_size=32,
)


def rows(count, seed):
    """Grey noise of 32 x 32 with a bright square of 3 to 12 pixels in one quadrant."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(60, 120, (count, 32, 32, 3)).astype(np.uint8)
    quadrants, sides = rng.integers(4, size=count), rng.integers(3, 13, size=count)
    for picture, quadrant, side in zip(pictures, quadrants, sides, strict=True):
        top, left = 16 * (quadrant // 2) + rng.integers(4), 16 * (quadrant % 2) + rng.integers(4)
        picture[top : top + side, left : left + side] = 250
    frame = pandas.DataFrame({"sample_id": np.arange(count), "quadrant": quadrants})
    frame["side"] = (sides / 12).astype(np.float32)
    frame["image"] = list(pictures)
    return frame


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
            num_classes=0,
        )  # fmt: skip

    def forward(self, image):
        return self.vit.forward_features(image)  # [B, 1 + 16, 48]


class Head(nn.Module):
    def __init__(self, num_outputs):
        super().__init__()
        self.output = nn.Sequential(nn.Flatten(), nn.Linear(17 * 48, num_outputs))

    def forward(self, tokens):
        return self.output(tokens)


def model():
    return Model(encoder=Tokens(), heads={task.name: Head(task.num_outputs) for task in TASKS})


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    data = CustomData(
        train=ray.data.from_items(rows(1_000, seed=1).to_dict("records")),
        evaluation=ray.data.from_items(rows(300, seed=2).to_dict("records")),
        inputs=INPUTS,
        tasks=TASKS,
    )
    print(fit(EXPERIMENT, model=model, data=data).metrics)
