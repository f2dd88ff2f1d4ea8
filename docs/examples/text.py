"""Two labels a sentence: its topic and whether it is kind, by a tiny transformer from scratch.

The representation is the tokens, [B, N, C]; heads attend to them once more. Run it:
python docs/examples/text.py
"""

import numpy as np
import pandas
import torch
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
from repmtl_ray.tasks import Binary

TOPICS = ("ship bay sail storm", "oven bread salt plate", "goal team match coach")
KIND, UNKIND = "fine warm clear happy", "dull cold broken sad"
FILLERS = "the a of and is was near then"
WORDS = ["<pad>", *" ".join([*TOPICS, KIND, UNKIND, FILLERS]).split()]
LENGTH = 12
TASKS = (Classification(name="topic", num_classes=3), Binary(name="kind", measures=("accuracy",)))
INPUTS = ("tokens",)
EXPERIMENT = Experiment(
    data=DataConfig(name="custom"),
    policy=PolicyConfig(log_losses=False),  # all labels can be found: losses come near 0
    regularizer=RegularizerConfig(share=0.1),  # bounds Rep-MTL's penalties
    optimizer=OptimizerConfig(learning_rate=3e-3),
    epochs=3,
    batch_size=64,
)


def rows(count, seed):
    """Sentences of 5 to 12 words: fillers, two words of a topic, one of a mood."""
    rng = np.random.default_rng(seed)
    sentences, topics, moods = [], rng.integers(3, size=count), rng.integers(2, size=count)
    for topic, mood in zip(topics, moods, strict=True):
        words = [*rng.choice(TOPICS[topic].split(), 2), rng.choice((UNKIND, KIND)[mood].split())]
        words += list(rng.choice(FILLERS.split(), rng.integers(2, LENGTH - 2)))
        sentences.append(np.array([WORDS.index(word) for word in rng.permutation(words)]))
    frame = pandas.DataFrame({"sample_id": np.arange(count), "topic": topics, "kind": moods})
    frame["tokens"] = sentences
    return frame


def collate(columns):
    """Pads to one length, whatever the batch is."""
    tokens = torch.zeros(len(columns["tokens"]), LENGTH, dtype=torch.int64)
    for row, sentence in enumerate(columns["tokens"]):
        tokens[row, : len(sentence)] = torch.as_tensor(np.array(sentence))
    return {"tokens": tokens, "is_padding": tokens == 0}


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens, is_padding):
        hidden = self.layers(self.embed(tokens), src_key_padding_mask=is_padding)
        return hidden * ~is_padding[:, :, None]


class Head(nn.Module):
    """One query of its own attends to the tokens."""

    def __init__(self, num_outputs):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 32))
        self.attend = nn.MultiheadAttention(32, 2, batch_first=True)
        self.output = nn.Linear(32, num_outputs)

    def forward(self, tokens):
        query = self.query.expand(len(tokens), 1, 32)
        return self.output(self.attend(query, tokens, tokens, need_weights=False)[0][:, 0])


def model():
    return Model(encoder=Transformer(), heads={task.name: Head(task.num_outputs) for task in TASKS})


def best(frame):
    """A sentence says both labels, so that all of them can be found."""
    return {"topic/accuracy": 100.0, "kind/accuracy": 100.0}


if __name__ == "__main__":
    import ray

    from repmtl_ray import cluster, fit

    cluster.connect()
    data = CustomData(
        train=ray.data.from_pandas(rows(4_000, seed=1)),
        evaluation=ray.data.from_pandas(rows(1_000, seed=2)),
        inputs=INPUTS,
        tasks=TASKS,
        collate=collate,
    )
    print(fit(EXPERIMENT, model=model, data=data).metrics)
