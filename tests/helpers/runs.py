"""Small real steps for tests: a convolutional encoder with batch norm, two dense tasks with gaps in
their labels, float64.

Everything is a function of seeds, so that processes can build the same and take their own rows of
the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from repmtl_ray import policies
from repmtl_ray.collectives import Workers
from repmtl_ray.config import ComputeConfig, ModelConfig, PolicyConfig
from repmtl_ray.data.columns import Batch
from repmtl_ray.models import MultiTaskModel
from repmtl_ray.models.batch_norm import use_global_statistics
from repmtl_ray.models.compute import use_compute
from repmtl_ray.models.heads import build_head
from repmtl_ray.regularizers import RepMTL
from repmtl_ray.runs.step import Stepper
from repmtl_ray.tasks import Classification, InverseDepth, Segmentation, Task

DENSE: tuple[Task, ...] = (
    Segmentation(name="segmentation", num_classes=4),
    InverseDepth(name="depth"),
)
OFFICE: tuple[Task, ...] = tuple(
    Classification(name=name, num_classes=3) for name in ("art", "photo", "sketch")
)
BATCH_SIZE = 4
NEEDED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "Constant": {"weights": [0.7, 1.6]},
    "COSMOS": {"lambda_": 0.5},
    "PIVRG": {"single_task_losses": 0.5},
    **{name: {"outer": "train"} for name in ("Auto-Lambda", "FORUM", "MOML")},
    "TrimmedMean": {"trim_number": 0},
    "IGBv2": {
        "random_epochs": 1,
        "baseline_epoch": 0,
        "learning_epoch": 1,
        "learn_every": 2,
        "batch_size": 6,
    },
    # Adam's eps keeps rounding noise where a gradient is zero (a bias before batch norm) from
    # becoming whole steps, which differ between one worker and several.
    "MTAdam": {"eps": 1e-3},
}
"""For policies that do not work on two tasks, or do not show in three steps what they do, by their
defaults."""
BATCHES_AN_EPOCH = 2


def small_model(tasks: tuple[Task, ...], workers: Workers, *, head: str = "aspp") -> MultiTaskModel:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Tanh(),
    )
    if not tasks[0].dense:
        encoder.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    if not tasks[0].dense:
        config = ModelConfig(head="linear", features="pooled", output_stride=None)
    elif head == "linear":
        config = ModelConfig(head="linear")
    else:
        config = ModelConfig(head_channels=4, atrous_rates=(1, 2), dropout=0.0)
    model = MultiTaskModel(
        encoder, {task.name: build_head(config, task, 8) for task in tasks}, tasks
    )
    use_global_statistics(model, workers)
    return model.double()


def dense_batch(index: int, workers: Workers, *, size: int = BATCH_SIZE, absent: str = "") -> Batch:
    """Own rows of a global batch; the later rows have far fewer valid pixels than the first."""
    generator = torch.Generator().manual_seed(100 + index)
    images = torch.rand(size, 3, 8, 12, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (size, 8, 12), generator=generator)
    depth = 0.1 + images.mean(dim=1, keepdim=True)
    gaps = (
        torch.rand(size, 8, 12, generator=generator)
        < torch.linspace(0.05, 0.9, size)[:, None, None]
    )
    labels[gaps] = -1
    depth[gaps.flip(2)[:, None]] = 0
    if size > 1:
        depth[-1] = 0  # a sample without any depth
    if absent:
        depth[size // 2 if absent == "depth of the second half" else 0 :] = 0
    share = size // workers.size
    own = slice(workers.rank * share, (workers.rank + 1) * share)
    everything = slice(0, share)
    return Batch(
        inputs=images[own],
        targets={"segmentation": labels[own], "depth": depth[own]},
        rows={"segmentation": everything, "depth": everything},
        sample_ids=torch.arange(size)[own],
    )


def office_batch(
    index: int, workers: Workers, *, sizes: Sequence[int] = (BATCH_SIZE,) * 3
) -> Batch:
    """Own rows of three domains' images, one after the other; `sizes` are of the global batch."""
    generator = torch.Generator().manual_seed(200 + index)
    images, targets, rows = [], {}, {}
    first = 0
    for task, size in zip(OFFICE, sizes, strict=True):
        share = size // workers.size
        own = slice(workers.rank * share, (workers.rank + 1) * share)
        images.append(torch.rand(size, 3, 8, 12, dtype=torch.float64, generator=generator)[own])
        targets[task.name] = torch.randint(0, 3, (size,), generator=generator)[own]
        rows[task.name] = slice(first, first + share)
        first += share
    return Batch(
        inputs=torch.cat(images), targets=targets, rows=rows, sample_ids=torch.arange(first)
    )


def small_stepper(
    workers: Workers,
    policy: PolicyConfig,
    *,
    tasks: tuple[Task, ...] = DENSE,
    regularizer: tuple[float, float] = (0.0, 0.0),
    share: float | None = None,
    through: Literal["all", "encoder"] = "all",
    direction: Literal["penalty", "random", "flipped", "divergence"] = "penalty",
    representation: str = "encoder",
    head: str = "aspp",
    learning_rate: float = 0.05,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008
) -> Stepper:
    model = small_model(tasks, workers, head=head)
    use_compute(model, compute)
    return Stepper(
        model=model,
        tasks=tasks,
        policy=policies.build(policy, [task.name for task in tasks], seed=3),
        policy_name=policy.name,
        # Not Adam: it turns the rounding noise of a gradient that is zero (a bias before batch
        # norm) into whole steps.
        optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9),
        regularizer=RepMTL(
            *regularizer, temperature=0.5, workers=workers, share=share, through=through
        ),
        representation=representation,
        log_losses=policy.log_losses,
        max_gradient_norm=None,
        precision="float64",
        seed=3,
        workers=workers,
        direction=direction,
    )


def policy_config(name: str, **changes: Any) -> PolicyConfig:
    return PolicyConfig(**{"name": name, "arguments": NEEDED_ARGUMENTS.get(name, {}), **changes})


def parameters_after(
    workers: Workers, policy: PolicyConfig, options: Mapping[str, Any], steps: int = 3
) -> Tensor:
    """All parameters and running statistics after some steps, flat; what every worker count must
    agree on."""
    options = dict(options)
    sizes = options.pop("office_sizes", (BATCH_SIZE,) * 3)
    no_depth_at = options.pop("no_depth_at", ())
    absent_here = options.pop("absent", "depth")
    stepper = small_stepper(workers, policy, **options)
    for index in range(steps):
        if index % BATCHES_AN_EPOCH == 0:
            stepper.policy.begin_epoch(index // BATCHES_AN_EPOCH)
        is_dense = stepper.tasks[0].dense
        absent = absent_here if index in no_depth_at else ""
        make = (
            partial(dense_batch, absent=absent) if is_dense else partial(office_batch, sizes=sizes)
        )
        stepper.step(make(index, workers), global_step=index)
        if index % BATCHES_AN_EPOCH == BATCHES_AN_EPOCH - 1:
            stepper.policy.end_epoch()
    state = [tensor for tensor in stepper.model.state_dict().values() if tensor.is_floating_point()]
    return torch.cat([tensor.reshape(-1) for tensor in state])
