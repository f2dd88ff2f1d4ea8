"""Small problems of one's own for tests: rows, models and tasks that no data set of this project has.

Everything is a function of seeds. Models are functions of this module, so that processes can import
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repmtl_ray.config import DataConfig, Experiment, ModelConfig, OptimizerConfig
from repmtl_ray.data.batches import LocalRows
from repmtl_ray.data.stream import Kind, Sample, Stream
from repmtl_ray.models.own import Model
from repmtl_ray.runs.build import Split
from repmtl_ray.tasks import Binary, CustomTask, MultiLabel, Regression, Task

SHOP: tuple[Task, ...] = (Binary(name="click"), Binary(name="buy"))
SHOP_INPUTS = ("user", "item", "price")
TEXT: tuple[Task, ...] = (
    MultiLabel(name="topics", num_labels=3),
    Regression(name="score", loss="huber"),
)
NUM_USERS, NUM_ITEMS, NUM_WORDS, NUM_TOKENS = 12, 9, 20, 6


class Towers(nn.Module):
    """Embeddings of a user and an item beside a price, to [B, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(NUM_USERS, 4), nn.Embedding(NUM_ITEMS, 4)
        self.body = nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 8))

    def forward(self, user: Tensor, item: Tensor, price: Tensor) -> Tensor:
        return self.body(torch.cat([self.user(user), self.item(item), price[:, None]], dim=1))


def shop_model() -> Model:
    heads = {task.name: nn.Sequential(nn.Tanh(), nn.Linear(8, 1)) for task in SHOP}
    return Model(encoder=Towers(), heads=heads)


def pinball(prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of the 70 % quantile, by sample."""
    error = target - prediction
    return torch.maximum(0.7 * error, -0.3 * error)


def is_below(prediction: Tensor, target: Tensor) -> Tensor:
    return (target < prediction).double()


def weighed_entropy(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in which the last class counts three times, as a sum and a count."""
    loss = nn.functional.cross_entropy(prediction, target, reduction="none")
    weight = 1.0 + 2.0 * (target == 2)
    return (weight * loss).sum(), weight.sum()


def quantile_tasks() -> tuple[Task, ...]:
    """Losses and metrics of one's own: functions, and metrics of torchmetrics."""
    import torchmetrics

    return (
        CustomTask(
            name="quantile",
            loss=pinball,
            measures={
                "share_below_up": is_below,
                "r2": torchmetrics.R2Score(),
                "pearson": torchmetrics.PearsonCorrCoef(),
            },
        ),
        CustomTask(
            name="taste",
            kind="class",
            num_outputs=3,
            num_classes=3,
            loss=weighed_entropy,
            measures={"accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=3)},
            predict=softmax,
        ),
    )


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def quantile_model() -> Model:
    return Model(
        encoder=Towers(),
        heads={"quantile": nn.Linear(8, 1), "taste": nn.Sequential(nn.Tanh(), nn.Linear(8, 3))},
    )


def quantile_row(sample_id: int) -> dict[str, Any]:
    """A fifth of the samples lack the number, another fifth the class."""
    row, rng = shop_row(sample_id), np.random.default_rng([3, sample_id])
    amount = np.float32(row["price"] + 0.1 * rng.normal())
    row["quantile"] = np.float32("nan") if sample_id % 5 == 0 else amount
    row["taste"] = -1 if sample_id % 5 == 1 else int((row["user"] + row["item"]) % 3)
    return row


class Words(nn.Module):
    """A tiny transformer: tokens and their padding to [B, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, is_padding: Tensor) -> Tensor:
        hidden = self.layers(self.embed(tokens), src_key_padding_mask=is_padding)
        return hidden * ~is_padding[:, :, None]


class AttentionHead(nn.Module):
    """Attends to all tokens once more, which Rep-MTL differentiates twice."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.output = nn.Linear(8, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        attended, _ = self.attend(features, features, features, need_weights=False)
        return self.output(attended.mean(dim=1))


def text_model() -> Model:
    return Model(encoder=Words(), heads={"topics": AttentionHead(3), "score": AttentionHead(1)})


def padded(columns: Any) -> dict[str, Tensor]:
    """`CustomData.collate` of sentences of several lengths."""
    tokens = torch.zeros(len(columns["tokens"]), NUM_TOKENS, dtype=torch.int64)
    for row, sentence in enumerate(columns["tokens"]):
        tokens[row, : len(sentence)] = torch.from_numpy(np.array(sentence))
    return {"tokens": tokens, "is_padding": tokens == 0}


def shop_row(sample_id: int) -> dict[str, Any]:
    """Who does not click is not asked whether to buy."""
    rng = np.random.default_rng([1, sample_id])
    user, item, price = rng.integers(NUM_USERS), rng.integers(NUM_ITEMS), rng.random()
    click = int(rng.random() < 0.3 + 0.5 * ((user + item) % 2))
    return {
        "sample_id": sample_id,
        "user": int(user),
        "item": int(item),
        "price": np.float32(price),
        "click": click,
        "buy": int(rng.random() < 0.8 - 0.6 * price) if click else -1,
    }


def text_row(sample_id: int) -> dict[str, Any]:
    """A sentence of 2 to 6 words, which topics it names, and a score that some lack."""
    rng = np.random.default_rng([2, sample_id])
    tokens = rng.integers(1, NUM_WORDS, rng.integers(2, NUM_TOKENS + 1))
    return {
        "sample_id": sample_id,
        "tokens": tokens,
        "topics": np.array([int((tokens % 3 == k).any()) for k in range(3)]),
        "score": np.float32("nan" if sample_id % 4 == 0 else tokens.mean() / 10),
    }


class RaggedRows(LocalRows):
    """Rows whose arrays have several lengths, as blocks of Ray Data hold them."""

    def fetch(self, indices: Any, columns: Any = None) -> dict[str, Any]:
        samples = [self._sample(int(index)) for index in indices]
        stacked: dict[str, Any] = {}
        for name in columns if columns is not None else samples[0]:
            values = [sample[name] for sample in samples]
            if len({value.shape for value in values}) == 1:
                stacked[name] = np.stack(values)
            else:
                stacked[name] = np.empty(len(values), dtype=object)
                stacked[name][:] = values
        return stacked


def split_of(
    row: Callable[[int], dict[str, Any]],
    ids: range,
    tasks: tuple[Task, ...],
    make_model: Callable[[], Model],
    *,
    inputs: tuple[str, ...],
    collate: Any = None,
) -> Split:
    """Rows of one's own as a split of the loop, without Ray."""

    def load(index: int) -> Sample:
        return {name: np.asarray(value) for name, value in row(ids[index]).items()}

    kinds: dict[str, Kind] = {task.name: task.kind for task in tasks}
    stream = Stream(
        name="custom",
        kinds=kinds,
        num_samples=len(ids),
        load=load,
        inputs=inputs,
        make_inputs=collate,
    )
    return Split(
        streams=(stream,), rows={"custom": RaggedRows(stream)}, tasks=tasks, make_model=make_model
    )


def shop_split(ids: range) -> Split:
    return split_of(shop_row, ids, SHOP, shop_model, inputs=SHOP_INPUTS)


def quantile_split(ids: range) -> Split:
    return split_of(quantile_row, ids, quantile_tasks(), quantile_model, inputs=SHOP_INPUTS)


def text_split(ids: range) -> Split:
    return split_of(text_row, ids, TEXT, text_model, inputs=("tokens",), collate=padded)


def own_experiment(**changes: Any) -> Experiment:
    """Three steps an epoch on 24 rows of one's own; in float64, so that workers can be compared."""
    settings: dict[str, Any] = {
        "data": DataConfig(name="custom"),
        "model": ModelConfig(encoder="custom"),
        "optimizer": OptimizerConfig(name="sgd", learning_rate=0.05),
        "epochs": 2,
        "batch_size": 8,
        "precision": "float64",
    }
    return Experiment(**(settings | changes))
